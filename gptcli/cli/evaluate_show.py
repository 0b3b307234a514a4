"""What `gpt eval` shows: tables of results, the list of tasks, a bar while it works."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptcli.eval.results import Result


def table(results: list[Result]) -> list[str]:
    """Perplexity and compression in words, all else a line for each metric."""
    lines = [line for r in results if r.task in WORDS for line in WORDS[r.task](r)]
    rest = [r for r in results if r.task not in WORDS]
    if not rest:
        return lines
    from gptcli.inspect.terminal import columns

    rows = [("task", "metric", "value", "stderr", "n")]
    for result in rest:
        for i, (name, value) in enumerate(result.metrics.items()):
            stderr = f"± {result.stderr[name]:.4g}" if name in result.stderr else ""
            rows.append((result.task if i == 0 else "", name, f"{value:.4f}", stderr, "" if i else str(result.n)))
        for group, metrics in result.groups.items():
            rows.append((f"  {group}", result.main, f"{metrics[result.main]:.4f}", "", f"{metrics['n']:.0f}"))
    return lines + columns(rows)


def _perplexity(result: Result) -> list[str]:
    m = result.metrics
    cost = f" (int8: {m['int8_cost']:+.2%})" if "int8_cost" in m else ""
    return [
        f"perplexity     {m['perplexity']:.3f} per token{cost}, {m['word_perplexity']:.3f} per word",
        f"bits per byte  {m['bits_per_byte']:.4f}",
        f"on             {result.n} documents, {m['tokens']:,} tokens, {m['bytes']:,} bytes",
        f"windows        {result.settings['context_length']} tokens, moving on by {result.settings['stride']}",
    ]


def _compression(result: Result) -> list[str]:
    m = result.metrics
    lines = [f"bits per byte on {result.n} held-out documents ({m['bytes']:,} bytes)"]
    for name, value in (
        ("gzip -9", m["gzip"]),
        ("xz -9e, given the training text", m["xz_given_training_text"]),
        ("this model", m["bits_per_byte"]),
    ):
        lines.append(f"  {name:<32} {value:.3f}  " + "█" * round(16 * value))
    return lines


WORDS = {"perplexity": _perplexity, "compression": _compression}


def task_list() -> list[str]:
    """Name, what is asked, where the rows are and what they look like, and the figures to reproduce."""
    from gptcli.eval.tasks import TASKS

    lines = [
        "perplexity: of any text, per token and word, and bits per byte; --stride N, the context's length for disjoint",
        "    published: perplexity: GPT-2 124M 29.94 on WikiText-2, disjoint; 774M 19.44, at stride 512 16.45",
        "compression: bits per byte beside gzip and xz, on the run's held-out documents",
    ]
    for task in TASKS.values():
        if task.name.startswith("blimp_"):
            continue
        more = f" (blimp_{task.groups[0]}, ...: one each)" if task.groups else ""
        lines.append(f"{task.name}: {task.about}{more}")
        lines.append(f"    data: {task.data or '--data FILE.jsonl'}; columns: " + shapes(task))
        if task.published:
            lines.append(f"    published: {task.published}")
    return lines


def task_rows() -> list[dict[str, Any]]:
    """The same for --json."""
    from gptcli.eval.tasks import TASKS

    return [
        {"name": t.name, "about": t.about, "kind": t.kind, "data": t.data, "columns": [s.columns for s in t.shapes]}
        for t in TASKS.values()
    ]


def shapes(task: Any) -> str:
    return " | ".join(", ".join(shape.columns) for shape in task.shapes)


def progress(name: str, quiet: bool) -> Any:
    """A bar on a terminal; the context's value takes the share done."""
    if quiet or not sys.stderr.isatty():
        return contextlib.nullcontext(lambda share: None)

    from rich.console import Console
    from rich.progress import Progress

    @contextlib.contextmanager
    def bar() -> Any:
        with Progress(console=Console(file=sys.stderr), transient=True) as shown:
            task = shown.add_task(name, total=1.0)
            yield lambda share: shown.update(task, completed=share)

    return bar()

"""Many results as one table: a line a figure, a column a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gptcli.errors import UserError
from gptcli.eval.results import Result, read_results


def read_all(files: Sequence[Path]) -> list[Result]:
    return [result for file in files for result in read_results(file)]


def results_of_run(run_dir: Path) -> list[Result]:
    """What `gpt eval -o RUN/NAME.json` has left there; other JSON files are passed over."""
    found = []
    for file in sorted([*run_dir.glob("*.json"), *run_dir.glob("eval/*.json")]):
        try:
            found += read_results(file)
        except UserError:
            continue
    return found


def results_table(results: Sequence[Result], *, main_only: bool = True) -> list[list[str]]:
    """The first row names the checkpoints. Only answers to the same questions share a line."""
    checkpoints = list(dict.fromkeys(result.checkpoint for result in results))
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for result in results:
        for metric in [result.main] if main_only else result.metrics:
            line = lines.setdefault((result.task, result.prompt_hash, metric), {})
            line[result.checkpoint] = figure(result, metric)
    asked = {task: [h for t, h in dict.fromkeys((t, h) for t, h, _ in lines) if t == task] for task, _, _ in lines}
    counts = {(result.task, result.prompt_hash): result.n for result in results}
    table = [["task", "metric", "n", *checkpoints]]
    for (task, prompts, metric), line in lines.items():
        name = task if len(asked[task]) == 1 else f"{task} ({_what_differs(results, task, prompts)})"
        table.append([name, metric, f"{counts[task, prompts]:,}", *(line.get(c, "") for c in checkpoints)])
    return table


def figure(result: Result, metric: str) -> str:
    error = result.stderr.get(metric)
    return f"{result.metrics[metric]:.4g}" + ("" if error is None else f" ± {error:.2g}")


def _what_differs(results: Sequence[Result], task: str, prompts: str) -> str:
    """The examples an item gets tell most variants of a task apart, the questions' hash all of them."""
    shots = {r.prompt_hash: r.settings.get("num_fewshot") for r in results if r.task == task}
    if len(set(shots.values())) == len(shots):
        return f"{shots[prompts]}-shot"
    return prompts[:8]

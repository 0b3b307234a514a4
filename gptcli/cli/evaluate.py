"""gpt eval"""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gptcli.cli import options
from gptcli.cli.checkpoint import open_checkpoint
from gptcli.cli.classify import SkipBad, evaluate_head, head_table
from gptcli.errors import UserError, nearest

TASKS = ("perplexity", "compression", "finetune")


def evaluate(
    task: Annotated[str, typer.Option("--task", metavar="|".join(TASKS), help="What to measure.")] = "perplexity",
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text: files, folders, globs, -. Left out: the held-out part of the run's own data."),
    ] = None,
    checkpoint: options.Checkpoint = None,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens a window moves on; left out: half the context (compression: a quarter)."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="finetune: every prediction, a row of JSON.")
    ] = None,
    skip_bad: SkipBad = False,
    int8: options.Int8 = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """Measure a model on text.

    perplexity: per token, and bits per byte. compression: bits per byte beside gzip -9, and xz -9e that was given
    the training text first, on the run's held-out documents. finetune: a task head's figures on labelled examples.
    """
    if task not in TASKS:
        raise UserError(f"--task {task}: no such task{nearest(task, TASKS)}; known: {', '.join(TASKS)}")
    if task == "compression" and data:
        raise UserError("--task compression: compares on the run's own held-out documents, so it takes no --data")
    loaded = open_checkpoint(checkpoint, device=device, precision=precision, quiet=quiet)
    if task == "finetune":
        row = evaluate_head(loaded, data, output=output, skip_bad=skip_bad, quiet=quiet)
        row |= {"checkpoint": str(loaded.path), "tokenizer": loaded.tokenizer.hash}
        print(jsonlib.dumps(row) if json else "\n".join(head_table(row)))
        return

    from gptcli.data.sources import SourceReader
    from gptcli.eval.perplexity import measure

    train: list[str] = []
    if data:
        texts = list(SourceReader(list(data)).documents())
    else:
        train, texts = texts_of_run(loaded.path)
    if not texts:
        raise UserError(f"{', '.join(data) if data else loaded.path}: no text to measure on")
    # A compressor looks back as far as it can; for perplexity half a context is the usual price.
    stride = stride or max(1, loaded.config.context_length // (4 if task == "compression" else 2))
    with _progress(quiet) as advance:
        found = measure(loaded.model, loaded.tokenizer, texts, stride=stride, dtype=loaded.dtype, advance=advance)
    full = found
    if int8:
        loaded.packed(int8=True)
        with _progress(quiet) as advance:
            found = measure(loaded.model, loaded.tokenizer, texts, stride=stride, dtype=loaded.dtype, advance=advance)
    row = {
        "task": task,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
        "nll": found.nll,
        "tokens": found.tokens,
        "bytes": found.bytes,
        "n": len(texts),
        "stride": stride,
        "context_length": loaded.config.context_length,
        "checkpoint": str(loaded.path),
        "tokenizer": loaded.tokenizer.hash,
    }
    if int8:
        row |= {"perplexity_unpacked": full.perplexity, "int8_cost": found.perplexity / full.perplexity - 1}
    if task == "compression":
        from gptcli.eval.compression import compressors

        row |= compressors(train, texts)
    if json:
        print(jsonlib.dumps(row))
    else:
        print("\n".join(_table(row)))


def texts_of_run(checkpoint: Path) -> tuple[list[str], list[str]]:
    """The training and held-out documents of the run that a checkpoint belongs to."""
    from gptcli.config.load import load_recipe
    from gptcli.data.prepare import corpus_of

    recipe_file = checkpoint.parent / "recipe.yaml"
    if not recipe_file.is_file():
        raise UserError(f"{checkpoint}: not a run's checkpoint, so its held-out text is unknown; give --data")
    data = load_recipe(str(recipe_file)).data
    if data.path is not None or data.mixture:
        raise UserError(f"{recipe_file}: trained on tokenized data, whose text is not kept; give --data")
    train: list[str] = []
    held_out: list[str] = []
    for split, text in corpus_of(data).parts():
        (held_out if split == "val" else train).append(text)
    return train, held_out


def _table(row: dict[str, Any]) -> list[str]:
    if row["task"] == "perplexity":
        cost = f" (int8: {row['int8_cost']:+.2%})" if "int8_cost" in row else ""
        return [
            f"perplexity     {row['perplexity']:.3f} per token{cost}",
            f"bits per byte  {row['bits_per_byte']:.4f}",
            f"on             {row['n']} documents, {row['tokens']:,} tokens, {row['bytes']:,} bytes",
            f"windows        {row['context_length']} tokens, moving on by {row['stride']}",
        ]
    lines = [f"bits per byte on {row['n']} held-out documents ({row['bytes']:,} bytes)"]
    for name, value in (
        ("gzip -9", row["gzip"]),
        ("xz -9e, given the training text", row["xz_given_training_text"]),
        ("this model", row["bits_per_byte"]),
    ):
        lines.append(f"  {name:<32} {value:.3f}  " + "█" * round(16 * value))
    return lines


def _progress(quiet: bool) -> Any:
    """A bar on a terminal; the context's value takes the share done."""
    import contextlib

    if quiet or not sys.stderr.isatty():
        return contextlib.nullcontext(lambda share: None)

    from rich.console import Console
    from rich.progress import Progress

    @contextlib.contextmanager
    def bar() -> Any:
        with Progress(console=Console(file=sys.stderr), transient=True) as progress:
            task = progress.add_task("measuring", total=1.0)
            yield lambda share: progress.update(task, completed=share)

    return bar()

"""gpt classify, and gpt eval --task finetune: a finetuned head at work."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli import options
from gptcli.cli.checkpoint import open_checkpoint
from gptcli.errors import UserError, nearest
from gptcli.files import publishing

if TYPE_CHECKING:
    from gptcli.api import LoadedModel
    from gptcli.eval.finetune import TaskModel

SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave bad lines out, count and list them.")]


def classify(
    checkpoint: options.Checkpoint = None,
    input_file: Annotated[
        str, typer.Option("--input", "-i", metavar="FILE|-", help="Lines of JSON (.jsonl[.gz|.zst]) or of plain text.")
    ] = "-",
    only: Annotated[
        str | None, typer.Option("--only", metavar="LABEL", help="Print the lines with this label, and only those.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="So many lines at once; 1 answers each as it comes.")
    ] = 32,
    skip_bad: SkipBad = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """Label lines with a model that `gpt finetune` made: for each its label and probability, or its score.

    gpt classify -c runs/tweets < texts.txt

    gpt classify -c runs/tweets --only positive < texts.txt
    """
    if sys.stdin.isatty() and input_file == "-":
        raise UserError("gpt classify: nothing to read; pipe lines in, or name a file with -i")
    model = _task_model(open_checkpoint(checkpoint, device=device, precision=precision, quiet=quiet))
    if only is not None:
        _check_only(only, model)

    from gptcli.eval.labelling import label, read_items

    skipped: list[str] = []

    def bad(error: UserError) -> None:
        if not skip_bad:
            raise error
        skipped.append(str(error))

    for item, found in label(model, read_items(input_file, model.task, bad), batch_size, bad):
        if only is not None and str(found.label) != only:
            continue
        if json:
            print(jsonlib.dumps({"line": item.line, **found.row(model.task)}, ensure_ascii=False), flush=True)
        elif only is not None:
            print(item.line, flush=True)
        elif found.score is not None:
            print(f"{found.score:.4f}", flush=True)
        else:
            print(f"{found.label}\t{found.probability:.4f}", flush=True)
    _report(skipped, quiet)


def _check_only(only: str, model: TaskModel) -> None:
    task = model.task
    if task.levels:
        raise UserError(f"--only {only}: this model gives scores, not labels")
    if task.labels and only not in task.labels:
        hint = nearest(only, task.labels) or f"; it knows {', '.join(task.labels)}"
        raise UserError(f"--only {only}: not a label of this model{hint}")


def evaluate_head(
    loaded: LoadedModel,
    data: list[str] | None,
    *,
    output: Path | None,
    skip_bad: bool,
    limit: int | None,
    quiet: bool,
) -> dict[str, Any]:
    """Figures on labelled examples as a row; every prediction goes to `output`, a row of JSON each."""
    from gptcli.eval.labelling import evaluate_task

    if not data:
        raise UserError("--task finetune: needs --data, a file of examples")
    model = _task_model(loaded)
    with publishing(output) if output is not None else nullcontext() as file:
        write: Callable[[dict[str, Any]], Any] = lambda row: None  # noqa: E731
        if file is not None:
            write = lambda row: file.write(jsonlib.dumps(row, ensure_ascii=False) + "\n")  # noqa: E731
        found, skipped = evaluate_task(model, data, skip_bad=skip_bad, write=write, limit=limit)
    _report(skipped, quiet)
    labels = {"labels": list(model.task.labels)} if model.task.labels else {}
    return {"task": "finetune", "head": model.task.task, **found, **labels}


def head_table(row: dict[str, Any]) -> list[str]:
    """The figures for people."""
    names = ("accuracy", "f1", "matthews", "pearson", "spearman")
    lines = [f"{name:<14} {row[name]:.4f}" for name in names if name in row]
    if "f1" in row:
        of = f"of {row['labels'][1]}" if len(row["labels"]) == 2 else "mean of the labels"
        lines[names.index("f1")] += f"  ({of})"
    if "confusion" in row:
        width = max(8, *(len(label) + 2 for label in row["labels"]))
        lines += ["", "true \\ said".ljust(width) + "".join(label.rjust(width) for label in row["labels"])]
        for label, counts in zip(row["labels"], row["confusion"], strict=True):
            lines.append(label.ljust(width) + "".join(str(count).rjust(width) for count in counts))
    return [*lines, f"on             {row['labelled']} labelled examples of {row['n']}"]


def _task_model(loaded: LoadedModel) -> TaskModel:
    from gptcli.eval.finetune import TaskModel

    return TaskModel.of_checkpoint(loaded.path, loaded.model, loaded.tokenizer, loaded.dtype)


def _report(skipped: list[str], quiet: bool) -> None:
    from gptcli.data.examples import report_skipped

    if not quiet:
        report_skipped(skipped, lambda line: print(f"gpt: {line}", file=sys.stderr))

"""gpt compare"""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptcli.cli import options
from gptcli.cli.checkpoint import open_checkpoint
from gptcli.errors import UserError

if TYPE_CHECKING:
    from gptcli.eval.results import Result
    from gptcli.eval.run import Options

Side = Annotated[Path, typer.Argument(help="A checkpoint or run, or a file of `gpt eval -o`.")]


def compare(
    a: Side,
    b: Side,
    task: Annotated[
        str | None,
        typer.Option(
            "--task", metavar="NAME,...|FILE", help="As in `gpt eval`; of result files, left out: all of both."
        ),
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="As in `gpt eval`.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", "--k", min=0, help="Solved examples before each item.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many items of each task or part.")] = None,
    metric: Annotated[str | None, typer.Option(metavar="NAME", help="Left out: the task's main one.")] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    seed: options.Seed = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """Is B really better than A? Their difference on the same items, its interval and p-value (paired bootstrap).

    gpt compare runs/base runs/longer --task hellaswag

    gpt compare base.json longer.json
    """
    from gptcli.eval.compare import compare_results, comparison_lines
    from gptcli.eval.results import read_results
    from gptcli.eval.run import Options

    sides: list[list[Result]] = []
    for side in (a, b):
        if side.is_file():
            if data or num_fewshot is not None or limit is not None:
                raise UserError(f"{side}: was measured already; --data, --num-fewshot and --limit are for checkpoints")
            sides.append(read_results(side))
        else:
            if not side.exists():
                raise UserError(f"{side}: no such file or checkpoint")
            if task is None:
                raise UserError(f"{side}: is no file of results; say with --task what to measure")
            asked = Options(data=list(data or []), num_fewshot=num_fewshot, limit=limit, seed=seed or 0)
            sides.append(_measure(side, task, asked, device=device, precision=precision, quiet=quiet))
    rows = [
        compare_results(first, second, metric=metric, seed=seed or 0) for first, second in _pairs(sides, (a, b), task)
    ]
    if json:
        print(jsonlib.dumps(rows[0] if len(rows) == 1 else {"comparisons": rows}))
    else:
        print("\n\n".join("\n".join(comparison_lines(row)) for row in rows))


def _measure(path: Path, task: str, asked: Options, *, device: str, precision: str, quiet: bool) -> list[Result]:
    from gptcli.cli.evaluate import check_names, run
    from gptcli.eval.run import Subject
    from gptcli.eval.scorer import Scorer

    names = task.split(",")
    check_names(names, asked.data)
    loaded = open_checkpoint(path, device=device, precision=precision, quiet=quiet)
    settings = {"context_length": loaded.config.context_length, "int8": False}
    subject = Subject(Scorer(loaded.engine), str(loaded.path), loaded.tokenizer.hash, settings)
    return [run(name, loaded, subject, asked, quiet=quiet) for name in names]


def _pairs(sides: list[list[Result]], files: tuple[Path, Path], task: str | None) -> list[tuple[Result, Result]]:
    """The tasks that both sides have, of those asked for."""
    first, second = ({result.task: result for result in side} for side in sides)
    asked = None if task is None else _names(task)
    wanted = [name for name in first if name in second and (asked is None or name in asked)]
    if not wanted:
        theirs = [", ".join(side) for side in (first, second)]
        raise UserError(f"no task to compare on: {files[0]} has {theirs[0]}, {files[1]} has {theirs[1]}")
    return [(first[name], second[name]) for name in wanted]


def _names(task: str) -> set[str]:
    """Of tasks, those of task files as the files say."""
    from gptcli.eval.tasks import find_task

    return {find_task(name).name if "/" in name or "." in name else name for name in task.split(",")}

"""gpt doctor"""

from __future__ import annotations

import json as jsonlib
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptcli.cli import options
from gptcli.cli.checkpoint import pick_checkpoint
from gptcli.errors import UserError

if TYPE_CHECKING:
    from gptcli.doctor.examine import Finding
    from gptcli.modeldir import ModelDir

Names = Annotated[
    list[str] | None, typer.Option("--check", metavar="NAME", help="This check alone. Repeatable; left out: all.")
]
RandomModel = Annotated[bool, typer.Option("--random", help="Examine a small random model, whatever is in ./runs.")]


def doctor(
    checkpoint: options.Checkpoint = None,
    random: RandomModel = False,
    check: Names = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    device: options.Device = "auto",
) -> None:
    """Is the arithmetic right on this machine, with this model and device?

    Each check holds two ways to the same numbers against each other: cached and whole, packed and alone, one
    process and two, saved and loaded, ... It passes where its figure is at most its tolerance. Without a checkpoint
    a small random model is examined. Exits with 1 if a check fails.
    """
    if random and checkpoint is not None:
        raise UserError("--random examines a model of its own; leave out -c")

    from gptcli.dist.runtime import pick_device
    from gptcli.doctor.examine import examine, pick_checks
    from gptcli.doctor.subject import Subject

    place, chosen = pick_device(device), pick_checks(check or [])
    with tempfile.TemporaryDirectory() as scratch:
        folder = _folder(checkpoint, random, Path(scratch), quiet=quiet)
        subject, findings = Subject(folder, place), []
        for finding in examine(subject, chosen):
            findings.append(finding)
            if not json:
                print(_line(finding), flush=True)
    failed = [finding.check for finding in findings if finding.passed is False]
    if json:
        row = {"passed": not failed, "checkpoint": str(folder.path), "device": str(place)}
        print(jsonlib.dumps({**row, "checks": [finding.row() for finding in findings]}))
    if failed:
        if not quiet:
            print(f"gpt: {len(failed)} of {len(findings)} failed: {', '.join(failed)}", file=sys.stderr)
        raise typer.Exit(1)


def _folder(checkpoint: Path | None, random: bool, scratch: Path, *, quiet: bool) -> ModelDir:
    from gptcli.doctor.subject import random_model
    from gptcli.modeldir import open_model_dir
    from gptcli.train.checkpoint import newest_checkpoint

    if checkpoint is not None or (not random and newest_checkpoint(Path("runs")) is not None):
        return open_model_dir(pick_checkpoint(checkpoint, quiet=quiet))
    if not quiet and not random:
        print("gpt: no checkpoint in ./runs; examining a small random model", file=sys.stderr)
    return random_model(scratch)


def _line(finding: Finding) -> str:
    verdict = {True: "pass", False: "FAIL", None: "skip"}[finding.passed]
    figure = "-" if finding.figure is None else f"{finding.figure:.2g}"
    limit = f"(at most {finding.tolerance:g})"
    return f"{verdict}  {finding.check:<13}  {figure:>7} {limit:<16}  {finding.note or finding.meaning}"

"""gpt data show | stats | trace | contamination"""

from __future__ import annotations

import json as jsonlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptcli.cli import options
from gptcli.cli.contamination import contamination

if TYPE_CHECKING:
    from gptcli.data.view import View
    from gptcli.stages.look import Seen

data = typer.Typer(
    help="What the training sees: show, stats, trace, contamination.", no_args_is_help=True, rich_markup_mode=None
)
data.command()(contamination)

Target = Annotated[
    str, typer.Argument(metavar="WHAT", help="A tokenized directory, a recipe, or a file of conversations.")
]
Mask = Annotated[bool, typer.Option("--mask", help="Tell learned tokens apart: green, or in ⟦⟧ where not a terminal.")]


@data.command()
def show(
    what: Target,
    mask: Mask = False,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, metavar="N", help="How many.")] = 3,
    set_: options.Overrides = None,
    checkpoint: options.Checkpoint = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Print rows as the training gets them, decoded.

    gpt data show sft.yaml --mask

    gpt data show chat.jsonl --mask -c runs/base
    """
    _print(_see(what, set_, checkpoint, quiet).views(range(rows)), mask=mask, json=json)


@data.command()
def stats(
    what: Target,
    set_: options.Overrides = None,
    checkpoint: options.Checkpoint = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Count documents, tokens and what of them is learned.

    gpt data stats sft.yaml --json
    """
    counts = _see(what, set_, checkpoint, quiet).stats
    if json:
        print(jsonlib.dumps(counts))
        return
    for name, value in counts.items():
        print(f"{name.replace('_', ' '):<24} {f'{value:,}' if isinstance(value, int) else value}")


@data.command()
def trace(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    step: Annotated[int, typer.Option("--step", min=1, metavar="N", help="The optimizer step.")],
    mask: Mask = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Print the rows that one step of a run was trained on, decoded.

    gpt data trace runs/mine --step 100
    """
    from gptcli.stages.console import RunConsole
    from gptcli.stages.look import trace_step

    _print(trace_step(run, step, RunConsole(quiet=quiet)), mask=mask, json=json)


def _see(what: str, overrides: list[str] | None, checkpoint: Path | None, quiet: bool) -> Seen:
    """A file of conversations needs a checkpoint, whose tokenizer and template make rows of it."""
    from gptcli.cli.checkpoint import pick_checkpoint
    from gptcli.data.examples import KINDS
    from gptcli.data.sources import suffix
    from gptcli.stages.console import RunConsole
    from gptcli.stages.look import see, see_conversations

    console = RunConsole(quiet=quiet)
    if suffix(Path(what)) in KINDS:
        return see_conversations(what, pick_checkpoint(checkpoint, quiet=quiet), overrides or [], console)
    return see(what, overrides or [], console)


def _print(rows: Iterable[list[View]], *, mask: bool, json: bool) -> None:
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for number, row in enumerate(rows, start=1):
        for document, view in enumerate(row, start=1):
            if json:
                print(jsonlib.dumps({"row": number, "document": document, **view.row()}, ensure_ascii=False))
                continue
            print(f"--- row {number}.{document}: {view.tokens:,} tokens, {view.trained_tokens:,} learned")
            print(view.text(mask=mask, colour=colour))

"""Which checkpoint a verb means, and opening it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gptcli.errors import UserError

if TYPE_CHECKING:
    from gptcli.api import LoadedModel


def open_checkpoint(path: Path | None, *, device: str, precision: str, quiet: bool) -> LoadedModel:
    """The named checkpoint, else the newest under ./runs, whose name goes to stderr."""
    from gptcli.api import LoadedModel
    from gptcli.train.checkpoint import newest_checkpoint

    if path is None:
        path = newest_checkpoint(Path("runs"))
        if path is None:
            raise UserError("no checkpoint: ./runs holds none; name one with -c, or train one with `gpt pretrain`")
        if not quiet:
            print(f"gpt: using {path}", file=sys.stderr)
    return LoadedModel.open(path, device=device, precision=precision)

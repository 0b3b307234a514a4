"""Which checkpoint a verb means, and opening it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gptcli.errors import UserError

if TYPE_CHECKING:
    from gptcli.api import LoadedModel


def open_checkpoint(
    path: Path | None,
    *,
    draft: Path | None = None,
    draft_tokens: int = 4,
    device: str,
    precision: str,
    quiet: bool,
) -> LoadedModel:
    """The named checkpoint's model, else the newest's under ./runs."""
    from gptcli.api import LoadedModel

    chosen = pick_checkpoint(path, quiet=quiet)
    return LoadedModel.open(chosen, draft=draft, draft_tokens=draft_tokens, device=device, precision=precision)


def pick_checkpoint(path: Path | None, *, quiet: bool) -> Path:
    """The named checkpoint, else the newest under ./runs, whose name goes to stderr."""
    from gptcli.train.checkpoint import find_checkpoint, newest_checkpoint

    if path is not None:
        return find_checkpoint(path)
    newest = newest_checkpoint(Path("runs"))
    if newest is None:
        raise UserError("no checkpoint: ./runs holds none; name one with -c, or train one with `gpt pretrain`")
    if not quiet:
        print(f"gpt: using {newest}", file=sys.stderr)
    return newest

"""gptcli: the whole life of a GPT from one command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from gptcli.api import LoadedModel

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(
    path: str | Path,
    *,
    draft: str | Path | None = None,
    draft_tokens: int = 4,
    device: str = "auto",
    precision: str = "auto",
) -> LoadedModel:
    """Open a checkpoint, run directory or imported model for use in a notebook; see `gptcli.api`."""
    from gptcli.api import LoadedModel  # torch is imported only here

    return LoadedModel.open(path, draft=draft, draft_tokens=draft_tokens, device=device, precision=precision)

"""Where things are kept that can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """$GPTCLI_CACHE, else $XDG_CACHE_HOME/gptcli, else ~/.cache/gptcli."""
    if own := os.environ.get("GPTCLI_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gptcli"

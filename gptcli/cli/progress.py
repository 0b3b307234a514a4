"""A bar on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(quiet: bool, what: str) -> Iterator[Callable[[float], None]]:
    """The context's value takes the share done."""
    if quiet or not sys.stderr.isatty():
        yield lambda share: None
        return

    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=sys.stderr), transient=True) as shown:
        task = shown.add_task(what, total=1.0)
        yield lambda share: shown.update(task, completed=share)

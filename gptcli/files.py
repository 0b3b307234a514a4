"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def publish_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a hidden folder beside `target`, then give it that name, replacing what was there.

    Whatever `fill` raises leaves `target` as it was and no trace of the attempt.
    """
    work = target.parent / f".{target.name}.tmp"
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        fill(work)
        sync_tree(work)
        if target.exists():
            shutil.rmtree(target)
        os.replace(work, target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Make a file's contents, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

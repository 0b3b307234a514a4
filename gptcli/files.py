"""Files and folders that appear whole or not at all, and JSON objects read from files."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from gptcli.errors import UserError


def publish_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a hidden folder beside `target`, then give it that name, replacing what was there.

    Whatever `fill` raises leaves `target` as it was and no trace of the attempt.
    """
    work = target.parent / f".{target.name}.tmp"
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        fill(work)
        _open_as_the_umask_says(work)
        sync_tree(work)
        if target.exists():
            shutil.rmtree(target)
        os.replace(work, target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _open_as_the_umask_says(folder: Path) -> None:
    """Whoever may read the folder, made as the umask says, may read its files: some writers make theirs private."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


@contextlib.contextmanager
def publishing(target: Path) -> Iterator[IO[str]]:
    """A text file to write: beside `target` under a hidden name first, which nothing is left of if writing fails."""
    work = target.with_name(f".{target.name}.tmp")
    try:
        with work.open("w", encoding="utf-8") as file:
            yield file
        sync(work)
        os.replace(work, target)
    except BaseException:
        work.unlink(missing_ok=True)
        raise


def publish_text(target: Path, text: str) -> None:
    with publishing(target) as file:
        file.write(text)


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


def open_locked(path: Path) -> IO[bytes]:
    """A file to read and write, made where there is none, and locked until it is closed. Raises UserError where another
    process has it."""
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        where = path.parent if path.name[:1] == "." else path
        raise UserError(f"{where}: another process is writing it") from None
    return file


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises OSError, and ValueError for what is none."""
    tree = json.loads(file.read_text("utf-8"))
    if not isinstance(tree, dict):
        raise ValueError("not a JSON object")
    return tree

"""A file of JSON rows that a killed process leaves fit to go on with."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from gptcli.errors import GptError, UserError
from gptcli.files import open_locked, publish_text, read_object, sync

TAIL = 1 << 16  # bytes looked at in one go for the end of the last whole row


class RowFile:
    """Rows, each written whole before the next; what a kill left of the last one is cut off when it is opened again.

    PATH.meta.json beside it, written first, says what makes the rows, so that none made otherwise are added. Nothing is
    changed before the first row: what fails until then leaves what was there, or nothing.
    """

    def __init__(self, path: Path, made_by: dict[str, Any], *, overwrite: bool = False) -> None:
        """Raises UserError if `path` holds rows that were made by something else."""
        self.path, self._made_by = path, made_by
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise UserError(f"{path}: {'is a folder' if path.is_dir() else 'the folder it should be in is missing'}")
        self._new, self._ready = not path.exists(), False
        self._file = open_locked(path)
        self._kept = 0 if overwrite else _end_of_rows(self._file)
        self._begins = overwrite or os.fstat(self._file.fileno()).st_size == 0
        if not self._begins:
            try:
                _check_same(path, made_by)
            except UserError:
                self._file.close()
                raise

    def _get_ready(self) -> None:
        if self._ready:
            return
        self._file.truncate(self._kept)  # first: old rows must never stand beside a new description
        if self._begins:
            _write_meta(self.path, self._made_by)
        self._file.seek(self._kept)
        self._ready = True

    def kept(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number from 1, row) of what was there when it was opened."""
        with self.path.open("rb") as file:
            number = 0
            while file.tell() < self._kept:
                number += 1
                try:
                    row = json.loads(file.readline())
                except ValueError:
                    row = None
                if not isinstance(row, dict):
                    raise UserError(f"{self.path}:{number}: damaged (not a JSON object); begin anew with --overwrite")
                yield number, row

    def write(self, line: bytes) -> None:
        """Raises GptError where the disk does not take it."""
        try:
            self._get_ready()
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise GptError(
                f"{self.path}: {error.strerror}; the same command goes on from the last whole row"
            ) from error

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None:
            self._get_ready()
        elif self._new and not self._ready:
            self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # of rows that a full disk did not take, which was said
            self._file.close()
        if self.path.exists():
            sync(self.path)


def begun_with(path: Path, key: str) -> Any:
    """What `path`, if it is there, was begun with; None where nothing tells."""
    return _read_meta(path).get(key) if path.is_file() and path.stat().st_size else None


def meta_path(path: Path) -> Path:
    return path.with_name(path.name + ".meta.json")


def _check_same(path: Path, made_by: dict[str, Any]) -> None:
    then = _read_meta(path)
    if not then:
        raise UserError(f"{path}: exists, and no {meta_path(path).name} says what made it; --overwrite begins anew")
    now = json.loads(json.dumps(made_by))
    for key in sorted(then.keys() | now.keys()):
        if then.get(key) != now.get(key):
            raise UserError(
                f"{path}: was begun with {key} {_show(then.get(key))}, now it is {_show(now.get(key))}; "
                "take another -o, or begin anew with --overwrite"
            )


def _show(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _read_meta(path: Path) -> dict[str, Any]:
    file = meta_path(path)
    try:
        return read_object(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: damaged ({error}); begin anew with --overwrite") from error


def _write_meta(path: Path, made_by: dict[str, Any]) -> None:
    publish_text(meta_path(path), json.dumps(made_by, indent=2, ensure_ascii=False) + "\n")


def _end_of_rows(file: IO[bytes]) -> int:
    """The place after the last line break."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - TAIL)
        file.seek(start)
        at = file.read(end - start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0

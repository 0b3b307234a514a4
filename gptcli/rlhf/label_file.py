"""The file of labels: a row is on the disk before the next question is asked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gptcli.errors import UserError
from gptcli.files import open_locked
from gptcli.rlhf.labels import Id, Question

BEGIN = b'{"id": '  # of each row
KEYS = ("id", "prompt", "responses", "labeller")


class LabelFile:
    """Rows of JSON that only ever grow, but for a label that is taken back. Several labellers may share it, one after
    the other."""

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        """Raises UserError for a file of anything else, which stays as it is without `overwrite`."""
        self.path, self.rows = path, list[dict[str, Any]]()
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise UserError(f"{path}: {'is a folder' if path.is_dir() else 'the folder it should be in is missing'}")
        self._file = open_locked(path)
        if overwrite:
            self._file.truncate(0)
        self._starts = [0]  # of each row, and of the next
        *lines, rest = self._file.read().split(b"\n")
        if complete := _parse(rest) is not None:  # but for its line break
            lines.append(rest)
        elif rest[: len(BEGIN)] != BEGIN[: len(rest)]:
            raise UserError(f"{path}: exists and is no file of labels; take another -o")
        for number, line in enumerate(lines, start=1):
            if (row := _parse(line)) is None:
                raise UserError(f"{path}:{number}: not a label of `gpt rlhf-label`; mend the line or take another -o")
            self.rows.append(row)
            self._starts.append(self._starts[-1] + len(line) + 1)
        if complete:
            self._file.write(b"\n")
        self._cut()  # what a kill left of a row

    def labelled(self, labeller: str, questions: list[Question]) -> list[Id]:
        """The ids that `labeller` has labelled. Raises UserError where a label is of other answers than the question
        now holds."""
        asked, found = {question.id: question for question in questions}, list[Id]()
        for number, row in enumerate(self.rows, start=1):
            question = asked.get(row["id"])
            if question and (row["prompt"], row["responses"]) != (question.prompt, question.responses):
                raise UserError(
                    f"{self.path}:{number}: labels other answers to {row['id']!r} than are there now; "
                    "take another -o, or the prompts and answers that it was made of"
                )
            if row["labeller"] == labeller:
                found.append(row["id"])
        return found

    def add(self, row: dict[str, Any]) -> None:
        self._file.seek(self._starts[-1])
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._sync()
        self.rows.append(row)
        self._starts.append(self._file.tell())

    def take_back(self, id: Id, labeller: str) -> bool:
        """Remove the last row, if it is this one."""
        if not self.rows or (self.rows[-1]["id"], self.rows[-1]["labeller"]) != (id, labeller):
            return False
        self.rows.pop()
        self._starts.pop()
        self._cut()
        return True

    def _cut(self) -> None:
        self._file.truncate(self._starts[-1])
        self._sync()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> LabelFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and all(key in row for key in KEYS) else None

"""Accuracy on questions like `Athens Greece Oslo Norway`, in word2vec's questions-words.txt shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gptcli.errors import UserError
from gptcli.inspect.words import WordSpace

CHUNK = 256  # questions that are compared with the whole vocabulary at once


@dataclass
class Section:
    """skipped: questions with a word that is no single token."""

    name: str
    correct: int = 0
    asked: int = 0
    skipped: int = 0

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.asked if self.asked else None


def read_questions(file: Path) -> dict[str, list[list[str]]]:
    """Section name -> lines of four words. Raises UserError naming file and line."""
    sections: dict[str, list[list[str]]] = {}
    name = "(no section)"
    for number, line in _lines(file):
        words = line.split()
        if words[:1] == [":"] and len(words) > 1:
            name = " ".join(words[1:])
        elif len(words) == 4 and ":" not in words:
            sections.setdefault(name, []).append(words)
        elif words:
            raise UserError(f"{file}:{number}: expected four words, or `: section`, got {line.strip()!r}")
    if not sections:
        raise UserError(f"{file}: holds no question (four words a line)")
    return sections


def measure(space: WordSpace, questions: dict[str, list[list[str]]]) -> list[Section]:
    return [_measure_section(space, name, lines) for name, lines in questions.items()]


def total(sections: list[Section]) -> Section:
    return Section("total", *(sum(getattr(s, field) for s in sections) for field in ("correct", "asked", "skipped")))


def _measure_section(space: WordSpace, name: str, lines: list[list[str]]) -> Section:
    """a is to b as c is to d: d's vector should be the nearest to b - a + c, a, b and c left out (3CosAdd)."""
    section = Section(name)
    known = [(words, ids) for words in lines if (ids := _same_form(space, words)) is not None]
    section.skipped, section.asked = len(lines) - len(known), len(known)
    for start in range(0, len(known), CHUNK):
        part = known[start : start + CHUNK]
        a, b, c, _ = space.table[torch.tensor([ids for _, ids in part], device=space.table.device)].unbind(1)
        cosines = (b - a + c) @ space.table.T  # up to each row's length, which changes no order
        for row, (words, _) in zip(cosines, part, strict=True):
            row[[id for word in words[:3] for id in space.forms(word)]] = -torch.inf
            section.correct += int(row.argmax()) in space.forms(words[3])
    return section


def _same_form(space: WordSpace, words: list[str]) -> list[int] | None:
    """The words' tokens, all after a space or all bare: a mixture would compare the spaces too."""
    for prefix in (" ", ""):
        ids = [id for word in words if (id := space.single_token(prefix + word)) is not None]
        if len(ids) == len(words):
            return ids
    return None


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    try:
        with file.open(encoding="utf-8") as handle:
            yield from enumerate(handle, start=1)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error.reason})") from error

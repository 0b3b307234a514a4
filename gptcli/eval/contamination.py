"""Which evaluation items has a training corpus seen? Items that share an n-gram of words with it, as GPT-3's paper
asked (Brown et al. 2020, appendix C): words are lower-cased, without punctuation; n is the 5th percentile of the
items' lengths, but at least 8 and at most 13.

The corpus streams by; only the items' n-grams are held. Most of its text is passed over by two cheap tests: every
word of an n-gram must be a word of some item, and the n-gram's hash must be that of an item's.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptcli.data.sources import read_jsonl
from gptcli.errors import UserError
from gptcli.eval.results import Result

SMALLEST, LARGEST = 8, 13
# Scripts written without spaces: each of their characters is a word.
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(f"[{UNSPACED}]|[^\\W_{UNSPACED}]+")
ASCII_WORDS = bytes(ord(chr(b).lower()) if b < 128 and chr(b).isalnum() else 32 for b in range(256))
NAMES = ("id", "UID", "pairID")  # columns that are no text
FACTOR = 0x9E3779B97F4A7C15  # odd, so that no word's part of a hash is lost

Ids = NDArray[np.int32]


def words_of(text: str) -> list[str]:
    """Lower-case runs of letters and digits."""
    if text.isascii():
        return text.encode().translate(ASCII_WORDS).decode().split()
    return WORD.findall(unicodedata.normalize("NFC", text).lower())


@dataclass(frozen=True)
class Item:
    """`texts`: what would stand in a corpus that holds the item."""

    id: str
    texts: tuple[str, ...]


def read_items(files: Sequence[Path]) -> list[Item]:
    """The lines of JSONL files, named as `gpt eval` names them: by place, from 0, after the file's name if there are
    several. Raises UserError for a file without items and an item without text."""
    items = []
    for file in files:
        group = f"{file.name.split('.')[0]}/" if len(files) > 1 else ""
        rows = list(read_jsonl(file))
        if not rows:
            raise UserError(f"{file}: holds no items")
        for place, (line, row) in enumerate(rows):
            texts = item_texts(row)
            if not texts:
                raise UserError(f"{file}:{line}: holds no text")
            items.append(Item(f"{group}{place}", texts))
    return items


def item_texts(row: dict[str, Any]) -> tuple[str, ...]:
    """The row's texts one after the other, before each of its choices if it has any: these hold every n-gram of
    each, and those that cross from one to the next where a corpus holds the item whole."""
    stem = " ".join(value for name, value in row.items() if isinstance(value, str) and name not in NAMES)
    lists = [value for value in row.values() if isinstance(value, list)]
    choices = [choice for value in lists for choice in value if isinstance(choice, str)]
    return tuple(text for text in ([f"{stem} {choice}" for choice in choices] or [stem]) if text.strip())


def ngram_size(lengths: Sequence[int]) -> int:
    """GPT-3's rule, from the items' lengths in words."""
    return int(np.clip(np.percentile(lengths, 5), SMALLEST, LARGEST))


@dataclass
class Match:
    """How an item was found: the first shared n-gram and where, and how many of the item's n-grams were."""

    where: str
    ngram: str
    found: set[bytes] = field(default_factory=set)


class Overlap:
    """The items' n-grams, and what has been seen of them. `too_short`: items with fewer than n words."""

    def __init__(self, items: Sequence[Item], n: int | None = None) -> None:
        texts = {item.id: [words_of(text) for text in item.texts] for item in items}
        if len(texts) != len(items):
            raise UserError("--items: two files have the same name, so their items could not be told apart")
        lengths = {name: max(map(len, of_item)) for name, of_item in texts.items()}
        self.n = n or ngram_size(list(lengths.values()))
        self.too_short = [name for name, length in lengths.items() if length < self.n]
        vocabulary = dict.fromkeys(word for of_item in texts.values() for words in of_item for word in words)
        self._words = ["", *vocabulary]
        self._ids = {word: i for i, word in enumerate(self._words) if i}
        self._owners: dict[bytes, list[str]] = {}
        hashes = [np.empty(0, np.uint64)]
        for name, of_item in texts.items():
            for words in of_item:
                ids = self._encode(words)
                starts = np.arange(max(0, len(ids) - self.n + 1))
                hashes.append(self._hashes(ids, starts))
                for key in self._keys(ids, starts):
                    owners = self._owners.setdefault(key, [name])
                    if owners[-1] != name:
                        owners.append(name)
        self._sorted = np.unique(np.concatenate(hashes))
        self.matches: dict[str, Match] = {}

    def scan(self, pieces: Iterable[tuple[str, bool, str]]) -> Iterator[int]:
        """Look through (where, whether it goes on from the piece before, text); yields each text's length, done."""
        tail: Ids = np.empty(0, np.int32)
        for where, goes_on, text in pieces:
            ids = self._encode(words_of(text))
            if goes_on:
                ids = np.concatenate([tail, ids])
            tail = ids[max(0, len(ids) - self.n + 1) :]
            self._look(ids, where)
            yield len(text)

    def _look(self, ids: Ids, where: str) -> None:
        unknown = np.concatenate([[0], np.cumsum(ids == 0)])
        starts = np.flatnonzero(unknown[self.n :] == unknown[: -self.n]) if len(ids) >= self.n else np.empty(0, int)
        if not len(starts) or not len(self._sorted):
            return
        hashes = self._hashes(ids, starts)
        place = np.searchsorted(self._sorted, hashes).clip(max=len(self._sorted) - 1)
        hits = starts[self._sorted[place] == hashes]
        for start, key in zip(hits, self._keys(ids, hits), strict=True):
            for name in self._owners.get(key, ()):
                if name not in self.matches:
                    ngram = " ".join(self._words[i] for i in ids[start : start + self.n])
                    self.matches[name] = Match(where, ngram)
                self.matches[name].found.add(key)

    def _encode(self, words: list[str]) -> Ids:
        return np.fromiter(map(self._ids.get, words, repeat(0)), np.int32, len(words))

    def _keys(self, ids: Ids, starts: NDArray[np.int64]) -> list[bytes]:
        """The n-grams that begin there, each as the bytes of its ids: exact, where a hash is not."""
        rows = np.ascontiguousarray(ids[starts[:, None] + np.arange(self.n)])
        return rows.view(f"V{rows.itemsize * self.n}").ravel().tolist() if len(rows) else []

    def _hashes(self, ids: Ids, starts: NDArray[np.int64]) -> NDArray[np.uint64]:
        out = np.zeros(len(starts), np.uint64)
        for offset in range(self.n):
            out = out * np.uint64(FACTOR) + ids[starts + offset].astype(np.uint64)
        return out


def scores_apart(result: Result, flagged: set[str]) -> list[dict[str, Any]]:
    """Each metric of the result over all items, over those that the corpus shares nothing with, and over the others."""
    clean = [item for item in result.items if item["id"] not in flagged]
    dirty = [item for item in result.items if item["id"] in flagged]
    rows = []
    for metric, how in result.aggregates.items():
        row: dict[str, Any] = {"task": result.task, "metric": metric, "checkpoint": result.checkpoint}
        for name, items in (("all", result.items), ("clean", clean), ("flagged", dirty)):
            value, stderr = how(items) if items else (None, None)
            row |= {name: value, f"{name}_stderr": stderr, f"n_{name}": len(items)}
        rows.append(row)
    return rows


def check_same_items(result: Result, items: Sequence[Item], file: Path) -> None:
    known = {item.id for item in items}
    if stranger := next((item["id"] for item in result.items if item["id"] not in known), None):
        raise UserError(f"{file}: {result.task} has an item {stranger!r}, which the items file does not")

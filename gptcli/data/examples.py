"""Examples to finetune on: JSON objects, a line or an array item each, known by file and line."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from gptcli.config.schema import DataBlock
from gptcli.data.shards import hash_unit
from gptcli.data.sources import (
    HUB,
    OnBad,
    decode,
    has_surrogates,
    hub_rows,
    list_files,
    open_parquet,
    parse_jsonl,
    read_bytes,
    read_jsonl,
    suffix,
)
from gptcli.errors import UserError, nearest

KINDS = (".jsonl", ".json", ".parquet")
T = TypeVar("T")


@dataclass(frozen=True)
class Example(Generic[T]):
    """What `parse` made of one object."""

    place: str  # FILE:LINE, for complaints
    text: str  # the object as JSON with sorted keys, which decides its split
    value: T


@dataclass
class ExampleReader(Generic[T]):
    """Reads the objects of `specs` (files, folders, globs, -, hf:NAME) and parses each.

    `parse` raises UserError with a reason alone; the reader puts file and line before it. `columns` says which of
    the file's columns to take for a name of ours. With skip_bad a bad object is noted in `skipped`, else it raises,
    `advice` saying last what its user can do.
    """

    specs: list[str]
    parse: Callable[[dict[str, Any]], T]
    columns: Mapping[str, str] = field(default_factory=dict)
    skip_bad: bool = False
    skipped: list[str] = field(default_factory=list)
    advice: str = ""

    def __iter__(self) -> Iterator[Example[T]]:
        for spec in self.specs:
            for place, row in _objects(spec, self.bad):
                try:
                    text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
                    if has_surrogates(text):
                        raise UserError("holds half of a surrogate pair, which is no text")
                    yield Example(place, text, self.parse(self._renamed(row)))
                except UserError as error:
                    self.bad(UserError(f"{place}: {error}"))

    def bad(self, error: UserError) -> None:
        if not self.skip_bad:
            raise UserError(f"{error}{self.advice}")
        self.skipped.append(str(error))

    def _renamed(self, row: dict[str, Any]) -> dict[str, Any]:
        for theirs in self.columns.values():
            if theirs not in row:
                raise UserError(f"no column {theirs!r} (data.columns){nearest(theirs, list(row))}")
        return {**row, **{ours: row[theirs] for ours, theirs in self.columns.items()}}


@dataclass(frozen=True)
class Examples(Generic[T]):
    train: list[Example[T]]
    val: list[Example[T]]
    skipped: list[str]

    @property
    def hash(self) -> str:
        """Of all objects and their order."""
        digest = hashlib.sha256()
        for name, part in (("train", self.train), ("val", self.val)):
            for example in part:
                digest.update(example.text.encode() + b"\n")
            digest.update(name.encode())
        return digest.hexdigest()[:16]


def open_examples(data: DataBlock, parse: Callable[[dict[str, Any]], T]) -> Examples[T]:
    """The recipe's examples: train and val files, or one set split by a hash of each object (split: tail: at its
    end). Raises UserError for a bad object (without skip_bad) and where nothing is left to train on."""
    if data.path is not None or data.mixture:
        raise UserError("data.path, data.mixture: hold tokens; this verb reads examples: data.train, or data.source")
    if not (data.source or data.train):
        raise UserError("data: nothing to train on; set data.train (and data.val), or data.source")
    advice = " (-s data.skip_bad=true leaves such lines out)"
    reader = ExampleReader(data.source or data.train, parse, data.columns, data.skip_bad, advice=advice)
    examples = list(reader)
    if data.val:
        held_out = ExampleReader(data.val, parse, data.columns, data.skip_bad, reader.skipped, advice)
        train, val = examples, list(held_out)
        if not val:
            raise UserError(
                f"{', '.join(data.val)}: holds nothing to measure by; leave data.val out to hold out a part"
            )
    elif data.split == "tail":
        cut = int(len(examples) * (1 - data.val_fraction))  # as of documents
        train, val = examples[:cut], examples[cut:]
    else:
        train = [e for e in examples if hash_unit(e.text) >= data.val_fraction]
        val = [e for e in examples if hash_unit(e.text) < data.val_fraction]
    if not train:
        what = f"all of it is bad ({reader.skipped[0]})" if reader.skipped else "it is empty, or all held out"
        raise UserError(f"{', '.join(reader.specs)}: nothing to train on: {what}")
    return Examples(train, val, reader.skipped)


def report_skipped(skipped: list[str], say: Callable[[str], None], *, shown: int = 5) -> None:
    """Count what was left out and list its first lines."""
    if skipped:
        say(f"skipped {len(skipped)} bad examples:")
        for reason in skipped[:shown]:
            say(f"  {reason}")
        if len(skipped) > shown:
            say(f"  and {len(skipped) - shown} more")


def _objects(spec: str, on_bad: OnBad) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of everything that `spec` names."""
    if spec == "-":
        yield from ((f"<stdin>:{n}", row) for n, row in parse_jsonl(sys.stdin.buffer, "<stdin>", on_bad=on_bad))
    elif spec.startswith(HUB):
        found = hub_rows(spec, where=spec, instead="give local files of the documented shape")
        yield from ((f"{spec} row {n}", row) for n, row in enumerate(found, start=1))
    else:
        for path in list_files(spec, KINDS):
            yield from ((f"{path}:{number}", row) for number, row in _objects_of_file(path, on_bad))


def _objects_of_file(path: Path, on_bad: OnBad) -> Iterator[tuple[int, dict[str, Any]]]:
    kind = suffix(path)
    if kind == ".parquet":
        batches = open_parquet(path).iter_batches()
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    elif kind == ".json":
        yield from _read_array(path, on_bad)
    else:
        yield from read_jsonl(path, on_bad=on_bad)


def _read_array(path: Path, on_bad: OnBad) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line where it begins, object) of a JSON file with one array of objects; one that holds an object a line, as
    many with this suffix do, is read as that."""
    text = decode(read_bytes(path), str(path))
    if not text.lstrip().startswith("["):
        yield from parse_jsonl(text.encode().splitlines(), str(path), on_bad=on_bad)
        return
    decoder, at, line = json.JSONDecoder(), text.index("[") + 1, 1
    counted = 0
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            return
        try:
            row, at = decoder.raw_decode(text, at)
        except ValueError as error:  # where the next item begins cannot be known
            on_bad(UserError(f"{path}:{line}: not JSON ({error})"))
            return
        if isinstance(row, dict):
            yield line, row
        else:
            on_bad(UserError(f"{path}:{line}: expected a JSON object"))

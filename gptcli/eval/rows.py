"""A task's rows from files or the hub, as items; and what is put before an item's context."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptcli.data.sources import HUB, has_surrogates, hub_rows, list_files, read_jsonl, suffix
from gptcli.errors import UserError
from gptcli.eval.task import Item, Row, Task
from gptcli.randomness import Permutation, derive

BAD_ROW = (KeyError, IndexError, ValueError, TypeError, AttributeError)


@dataclass(frozen=True)
class Placed:
    """An item and its name; `group` is the part of the task that it belongs to."""

    id: str
    group: str
    item: Item


def read_items(task: Task, data: Sequence[str], *, limit: int | None = None) -> list[Placed]:
    """The first `limit` items of each group, from `data` (files, folders, globs, hf:NAME...) or the task's own source.
    Raises UserError for none, for a row without the task's columns and for one that cannot be read."""
    sources = _given(data) if data else task.sources
    if not sources:
        raise UserError(f"--task {task.name}: has no data set of its own; give --data FILE.jsonl")
    placed: list[Placed] = []
    for group, spec in sources.items():
        before = len(placed)
        for number, (where, row) in enumerate(itertools.islice(_rows(task, spec), limit)):
            name = f"{group}/{number}" if group else str(number)
            placed.append(Placed(name, group, _item(task, where, row)))
        if len(placed) == before:
            raise UserError(f"{spec}: no rows for --task {task.name}")
    return placed


def _given(specs: Sequence[str]) -> dict[str, str]:
    """Each file a group of its own, named as the file, where there are several."""
    files = [s for spec in specs for s in ([spec] if spec.startswith(HUB) else map(str, list_files(spec)))]
    for file in files:
        if not file.startswith(HUB) and suffix(Path(file)) != ".jsonl":
            raise UserError(f"{file}: a task's data is .jsonl (.gz, .zst), one object a line")
    if len(files) == 1:
        return {"": files[0]}
    named: dict[str, str] = {}
    for file in files:
        if (other := named.setdefault(Path(file).name.split(".")[0], file)) != file:
            raise UserError(f"--data {other}, {file}: files of one name would be one group; rename one of them")
    return named


def _rows(task: Task, spec: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if spec.startswith(HUB):
        instead = "give --data FILE.jsonl with the columns that `gpt eval --list` names"
        for row in hub_rows(spec, where=f"--task {task.name} ({spec})", instead=instead):
            yield spec, row
    else:
        for line, row in read_jsonl(Path(spec)):
            yield f"{spec}:{line}", row


def _item(task: Task, where: str, row: Row) -> Item:
    shape = next((s for s in task.shapes if all(column in row for column in s.columns)), None)
    if shape is None:
        wanted = " or ".join(", ".join(s.columns) for s in task.shapes)
        raise UserError(f"{where}: --task {task.name} needs the columns {wanted}; here are {', '.join(row) or 'none'}")
    try:
        item = shape.make(row)
    except BAD_ROW as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{where}: cannot be read as an item of --task {task.name}: {reason}") from error
    texts = [text for pair in item.pairs for text in pair] + list(item.references)
    if not all(isinstance(text, str) for text in texts) or any(map(has_surrogates, texts)):
        raise UserError(f"{where}: cannot be read as an item of --task {task.name}: a column holds something but text")
    return item


@dataclass(frozen=True)
class Shots:
    """What comes before each context: an instruction, and k solved examples, drawn anew for every item by the seed. An
    item is never among its own examples."""

    examples: list[Placed]
    k: int
    seed: int
    separator: str
    instruction: str = ""

    def before(self, number: int, asked: Item) -> str:
        """The text before item `number` of all the data, separators and all. Raises UserError where the others are
        fewer than k."""
        parts = [self.instruction] if self.instruction else []
        parts += [example.solved for example in self._drawn(number, asked)]
        return "".join(part + self.separator for part in parts)

    def _drawn(self, number: int, asked: Item) -> list[Item]:
        order, n = Permutation(max(1, len(self.examples)), derive(self.seed, "fewshot", number)), len(self.examples)
        drawn: list[Item] = []
        for first in range(0, n if self.k else 0, self.k + 1):
            some = (self.examples[i].item for i in order[np.arange(first, min(n, first + self.k + 1))])
            drawn += [item for item in some if item != asked]
            if len(drawn) >= self.k:
                break
        if len(drawn) < self.k:
            raise UserError(f"--num-fewshot {self.k}: there are only {len(drawn)} examples to draw from")
        return drawn[: self.k]

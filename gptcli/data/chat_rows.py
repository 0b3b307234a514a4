"""Rows of conversations: packed or one each, in derived order, as micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from gptcli.contracts import IGNORE_INDEX, Batch
from gptcli.data.conversations import Encoded
from gptcli.errors import UserError
from gptcli.randomness import Permutation, derive

OPEN_ROWS = 64  # rows that a conversation may still be put into: enough to fill them, few enough to be quick
Row = list[Encoded]


def fit(example: Encoded, seq_len: int, truncation: str) -> Encoded:
    """The example if a row holds it; else as `truncation` says. Raises UserError where that is to leave it out.

    A row of `seq_len` inputs holds one token more, which is only predicted. left: the beginning goes, but never a
    token of the last answer, nor the one that it follows.
    """
    length, room = len(example), seq_len + 1
    if length <= room:
        return example
    said = f"{length} tokens, and a row holds {room} (train.seq_len {seq_len} + 1)"
    if truncation != "left":
        raise UserError(f"{said}; -s sft.truncation=skip leaves such out, left cuts their beginning")
    cut = length - room
    if example.answers[-1][0] <= cut:
        raise UserError(f"{said}; the last answer alone leaves no room for what it answers")
    answers = tuple((max(0, begin - cut), end - cut) for begin, end in example.answers if end > cut)
    trained = example.trained[cut:].copy()
    trained[0] = False
    return replace(example, ids=example.ids[cut:], trained=trained, answers=answers)


def pack(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Which examples share a row: each goes into the fullest of the last open rows that has room."""
    rows: list[list[int]] = []
    room: dict[int, int] = {}  # open row -> tokens that still fit
    for number, length in enumerate(lengths):
        fitting = [row for row, left in room.items() if left >= length]
        if fitting:
            row = min(fitting, key=lambda r: room[r])
        else:
            row = len(rows)
            rows.append([])
            room[row] = seq_len
            if len(room) > OPEN_ROWS:
                del room[min(room, key=lambda r: room[r])]
        rows[row].append(number)
        room[row] -= length
    return rows


class ChatRows:
    """Row g (from 0, over the whole training) -> its examples. Each epoch visits every row once, in its own order."""

    def __init__(self, examples: Sequence[Encoded], seq_len: int, seed: int, *, packing: bool) -> None:
        self._seed, self._epoch = seed, -1
        shuffled = Permutation(len(examples), derive(seed, "packing order"))[np.arange(len(examples))]
        # The last token of an example is only predicted, so an example takes one place less than it has tokens.
        numbers = (
            pack([len(examples[i]) - 1 for i in shuffled], seq_len) if packing else [[i] for i in range(len(shuffled))]
        )
        self.rows: list[Row] = [[examples[shuffled[i]] for i in row] for row in numbers]

    def get(self, rows: np.ndarray) -> list[Row]:
        return [self._row(int(number)) for number in rows]

    def _row(self, number: int) -> Row:
        epoch, place = divmod(number, len(self.rows))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = Permutation(len(self.rows), derive(self._seed, "row order", 0, epoch))
        return self.rows[int(self._order[np.array([place])][0])]


def chat_batch(rows: Sequence[Row]) -> Batch:
    """Rows side by side, as wide as the longest. Targets are what is to be learned; each example of a row is a
    document that sees itself alone, its positions counted from 0; padding is one more."""
    width = max((sum(len(e) - 1 for e in row) for row in rows), default=0) or 1
    tokens = np.zeros((len(rows), width), np.int64)
    targets = np.full((len(rows), width), IGNORE_INDEX, np.int64)
    documents = np.full((len(rows), width), -1, np.int64)
    for r, row in enumerate(rows):
        at = 0
        for number, example in enumerate(row):
            end = at + len(example) - 1
            tokens[r, at:end] = example.ids[:-1]
            targets[r, at:end] = np.where(example.trained[1:], example.ids[1:], IGNORE_INDEX)
            documents[r, at:end] = number
            at = end
    tensors = {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets)}
    if any(len(row) > 1 for row in rows):
        tensors["document_ids"] = torch.from_numpy(documents)
    return Batch(tensors, weight=int((targets != IGNORE_INDEX).sum()), tokens=int((documents >= 0).sum()))

"""Batches for a task head: encoded examples in derived order, padded to the longest row of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gptcli.config.plan import TrainPlan
from gptcli.contracts import IGNORE_INDEX, Batch
from gptcli.data.tasks import SPECIAL_TOKENS, Task, TaskExample, joined, part_budget
from gptcli.errors import UserError
from gptcli.randomness import Permutation, derive
from gptcli.tokenizer import Tokenizer


@dataclass(frozen=True)
class TaskRows:
    """An example's rows of token ids, and whether a part of one was cut."""

    rows: list[list[int]]
    cut: bool

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))


class TaskEncoder:
    """From examples to rows that fit the context."""

    def __init__(self, task: Task, tokenizer: Tokenizer, context_length: int) -> None:
        self.task, self._tokenizer, self.context_length = task, tokenizer, context_length
        ids = tokenizer.backend.get_vocab(with_added_tokens=True)
        self.start_id, self.delimiter_id, self.extract_id = (ids[token] for token in SPECIAL_TOKENS)

    def encode(self, examples: Sequence[TaskExample]) -> list[TaskRows | UserError]:
        """Each example's rows; the complaint, without its place, where one is too long and may not be cut."""
        texts = sorted({part for example in examples for row in example.rows for part in row})
        ids = dict(zip(texts, self._tokenizer.encode_batch(texts), strict=True))
        return [self._rows([[ids[part] for part in row] for row in example.rows]) for example in examples]

    def _rows(self, rows: list[list[list[int]]]) -> TaskRows | UserError:
        out, cut = [], False
        for parts in rows:
            length = 1 + len(parts) + sum(map(len, parts))
            if length > self.context_length:
                if not self.task.truncate:
                    return UserError(
                        f"a row of {length} tokens is longer than the context of {self.context_length}; "
                        "finetune.truncate cuts it"
                    )
                parts, cut = [part[: part_budget(self.context_length, len(parts))] for part in parts], True
            out.append(joined(parts, (self.start_id, self.delimiter_id, self.extract_id)))
        return TaskRows(out, cut)

    def batch(
        self, items: Sequence[TaskRows], targets: Sequence[Sequence[float]] | None, *, segments: bool, lm: bool
    ) -> Batch:
        """B examples of R rows together, padded at the right, where causality keeps it from mattering.

        tokens (R, T), extract (R,): the place of a row's first extract token, rows_of (B, K): an example's rows, -1
        where it has fewer, labels (B, width): the distribution to predict. On request segment_ids (R, T) and, for
        the language-model loss, targets (R, T) and row_weight (R,): 1 / an example's rows.
        """
        rows = [row for item in items for row in item.rows]
        counts = [len(item.rows) for item in items]
        longest = max(map(len, rows))
        tokens = torch.full((len(rows), longest), self.extract_id)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
        tensors = {
            "tokens": tokens,
            "extract": torch.tensor([len(row) - 1 for row in rows]),
            "rows_of": _numbered(counts),
        }
        if targets is not None:
            tensors["labels"] = _padded(targets)
        if segments:
            delimiters = tokens.eq(self.delimiter_id).long()
            tensors["segment_ids"] = delimiters.cumsum(1) - delimiters  # the delimiter itself ends the left side
        if lm:
            real = torch.arange(longest) <= tensors["extract"][:, None]
            shifted = tokens.masked_fill(~real, IGNORE_INDEX)[:, 1:]
            tensors["targets"] = torch.cat([shifted, torch.full((len(rows), 1), IGNORE_INDEX)], 1)
            tensors["row_weight"] = torch.tensor([1 / n for n in counts for _ in range(n)])
        return Batch(tensors, weight=len(items), tokens=sum(item.tokens for item in items))


def _numbered(counts: Sequence[int]) -> torch.Tensor:
    """[2, 1] -> [[0, 1], [2, -1]]"""
    ends = np.cumsum(counts)
    return torch.tensor([[*range(e - n, e), *[-1] * (max(counts) - n)] for n, e in zip(counts, ends, strict=True)])


def _padded(targets: Sequence[Sequence[float]]) -> torch.Tensor:
    width = max(map(len, targets))
    return torch.tensor([[*target, *[0.0] * (width - len(target))] for target in targets])


@dataclass(frozen=True)
class TaskData:
    """Encoded examples, each with the distribution to predict and what Task.truth says."""

    items: list[TaskRows]
    targets: list[list[float]]
    truth: list[float]
    encoder: TaskEncoder
    segments: bool
    lm: bool = False

    def batch(self, numbers: Sequence[int]) -> Batch:
        chosen, targets = [self.items[i] for i in numbers], [self.targets[i] for i in numbers]
        return self.encoder.batch(chosen, targets, segments=self.segments, lm=self.lm)


class TaskSource:
    """Examples `seen`, `seen` + 1, ... of an order derived for each epoch; each rank takes every dp_size-th."""

    def __init__(self, data: TaskData, plan: TrainPlan, seed: int, dp_rank: int = 0) -> None:
        self._data, self._plan, self._seed, self._dp_rank = data, plan, seed, dp_rank
        self.seen = 0

    def next_step(self) -> list[Batch]:
        plan = self._plan
        count = plan.rows_at(0)
        numbers = range(self.seen + self._dp_rank, self.seen + count, plan.dp_size)
        self.seen += count
        chosen = [self._example(number) for number in numbers]
        micro = plan.micro_batch_size
        return [self._data.batch(chosen[i : i + micro]) for i in range(0, len(chosen), micro)]

    def _example(self, number: int) -> int:
        n = len(self._data.items)
        epoch, place = divmod(number, n)
        order = Permutation(n, derive(self._seed, "example order", epoch))
        return int(order[np.array([place])][0])

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = int(state["seen"])

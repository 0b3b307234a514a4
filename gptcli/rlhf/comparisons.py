"""Batches of comparisons: all responses in one forward, and pairs that point at their rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gptcli.config.plan import TrainPlan
from gptcli.contracts import Batch
from gptcli.dist.runtime import Runtime
from gptcli.rlhf.preferences import Comparison
from gptcli.rlhf.sequences import pad_rows, pass_order, response_rows

Collate = Callable[[Sequence[Comparison]], Batch]


class ComparisonSource:
    """Comparisons `seen`, `seen` + 1, ... of the derived order, a new one each pass; each rank takes every
    dp_size-th. `collate` makes the batch: whatever a frozen model says of it belongs there."""

    def __init__(
        self, comparisons: Sequence[Comparison], collate: Collate, plan: TrainPlan, runtime: Runtime, seed: int
    ) -> None:
        self._comparisons, self._collate, self._plan, self._seed = comparisons, collate, plan, seed
        self._rank, self._size = runtime.dp_rank, runtime.dp_size
        self.seen = 0

    def next_step(self) -> list[Batch]:
        numbers = range(self.seen + self._rank, self.seen + self._plan.global_batch_size, self._size)
        self.seen += self._plan.global_batch_size
        order = pass_order(len(self._comparisons), self._seed, "comparison order", numbers)
        return batches([self._comparisons[i] for i in order], self._collate, self._plan.micro_batch_size)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = int(state["seen"])


def batches(comparisons: Sequence[Comparison], collate: Collate, micro_batch_size: int) -> list[Batch]:
    """Those of like length together: padding is computed too, and was half of the work on people's dialogues."""
    ordered = sorted(comparisons, key=lambda c: len(c.prompt) + max(map(len, c.responses)))
    return [collate(ordered[i : i + micro_batch_size]) for i in range(0, len(ordered), micro_batch_size)]


def whole_rows(comparisons: Sequence[Comparison]) -> Batch:
    """tokens (N, T) of every response behind its prompt, and the place of its last token (N,)."""
    rows = [row for c in comparisons for row in c.rows]
    last = torch.tensor([len(row) - 1 for row in rows])
    tensors = {"tokens": pad_rows(rows), "last": last, **pair_tensors(comparisons)}
    return Batch(tensors, weight=len(comparisons), tokens=sum(map(len, rows)))


def responses_alone(comparisons: Sequence[Comparison]) -> Batch:
    """tokens and targets (N, T): what counts is the response."""
    prompts = [c.prompt for c in comparisons for _ in c.responses]
    responses = [response for c in comparisons for response in c.responses]
    tokens, targets = response_rows(prompts, responses)
    count = sum(map(len, prompts)) + sum(map(len, responses))
    tensors = {"tokens": tokens, "targets": targets, **pair_tensors(comparisons)}
    return Batch(tensors, weight=len(comparisons), tokens=count)


def pair_tensors(comparisons: Sequence[Comparison]) -> dict[str, Tensor]:
    """(P,) each: rows of the better and the worse, p, margin, and the share of a pair in its comparison, all of which
    together count once (Ouyang et al. 2022, section 3.5)."""
    columns: list[tuple[int, int, float, float, float]] = []
    first = 0
    for c in comparisons:
        columns += [(first + p.better, first + p.worse, p.p, p.margin, 1 / len(c.pairs)) for p in c.pairs]
        first += len(c.responses)
    better, worse, p, margin, share = zip(*columns, strict=True)
    whole = {"better": torch.tensor(better), "worse": torch.tensor(worse)}
    return {**whole, "p": torch.tensor(p), "margin": torch.tensor(margin), "share": torch.tensor(share)}

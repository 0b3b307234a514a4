"""Batch sources for language modelling: training rows in derived order, held-out rows in file order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from gptcli.config.plan import TrainPlan
from gptcli.contracts import IGNORE_INDEX, Batch


class Rows(Protocol):
    """Rows by their number over the whole training."""

    def get(self, rows: np.ndarray) -> Any: ...


def lm_batch(rows: np.ndarray) -> Batch:
    """(B, T + 1) ids -> tokens and next-token targets (B, T)."""
    ids = torch.from_numpy(rows)
    targets = ids[:, 1:].contiguous()
    weight = int((targets != IGNORE_INDEX).sum())
    return Batch({"tokens": ids[:, :-1].contiguous(), "targets": targets}, weight=weight, tokens=targets.numel())


class RowSource:
    """Rows `rows_seen`, `rows_seen` + 1, ... of the derived order; each rank takes every dp_size-th.

    `collate` makes a micro-batch of some rows."""

    def __init__(self, rows: Rows, plan: TrainPlan, collate: Callable[[Any], Batch], dp_rank: int = 0) -> None:
        self._rows, self._plan, self._collate, self._dp_rank = rows, plan, collate, dp_rank
        self.rows_seen = 0

    def next_numbers(self) -> np.ndarray:
        """The rows of the next step, over all ranks; moves on."""
        count = self._plan.rows_at(self.rows_seen * self._plan.seq_len)
        self.rows_seen += count
        return np.arange(self.rows_seen - count, self.rows_seen)

    def next_step(self) -> list[Batch]:
        rows = self._rows.get(self.next_numbers()[self._dp_rank :: self._plan.dp_size])
        micro = self._plan.micro_batch_size
        return [self._collate(rows[i : i + micro]) for i in range(0, len(rows), micro)]

    def state_dict(self) -> dict[str, Any]:
        return {"rows_seen": self.rows_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows_seen = int(state["rows_seen"])


class PretrainSource(RowSource):
    def __init__(self, rows: Rows, plan: TrainPlan, dp_rank: int = 0) -> None:
        super().__init__(rows, plan, lm_batch, dp_rank)


def shared_evenly(
    chosen: Sequence[Any], empty: Any, collate: Callable[[Any], Batch], micro: int, rank: int, size: int
) -> list[Batch]:
    """This rank's batches of some held-out rows: equally many on every rank, the last filled up with `empty` rows."""
    mine = [*chosen[rank::size]]
    mine += [empty] * (-(-len(chosen) // size) - len(mine))
    return [collate(mine[i : i + micro]) for i in range(0, len(mine), micro)]


class HeldOutRows:
    """At most `max_rows` disjoint rows of held-out tokens, evenly spaced, the same at every validation.

    Every rank gets equally many batches; rows that pad the last ones have no targets.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        seq_len: int,
        max_rows: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        windows = max(1, -(-(len(tokens) - 1) // seq_len))
        chosen = np.unique(np.linspace(0, windows - 1, min(windows, max_rows)).astype(np.int64))
        per_rank = -(-len(chosen) // dp_size)
        self._mine = chosen[dp_rank::dp_size]
        self._padding = per_rank - len(self._mine)
        self._tokens, self._seq_len, self._micro = tokens, seq_len, micro_batch_size

    def __iter__(self) -> Iterator[Batch]:
        T = self._seq_len
        ids = np.full((len(self._mine) + self._padding, T + 1), IGNORE_INDEX, np.int64)
        for i, window in enumerate(self._mine):
            row = self._tokens[window * T : window * T + T + 1]
            ids[i, : len(row)] = row
        for i in range(0, len(ids), self._micro):
            part = ids[i : i + self._micro]
            batch = lm_batch(part)
            tokens = batch["tokens"].clamp(min=0)  # causal: what follows the last real token changes nothing
            yield Batch({**batch.tensors, "tokens": tokens}, batch.weight, batch.tokens)

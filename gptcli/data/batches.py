"""Batch sources for language modelling: training rows in derived order, held-out rows in file order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from gptcli.config.plan import TrainPlan
from gptcli.contracts import IGNORE_INDEX, Batch
from gptcli.data.rows import MixtureRows, TokenRows


def lm_batch(rows: np.ndarray) -> Batch:
    """(B, T + 1) ids -> tokens and next-token targets (B, T)."""
    ids = torch.from_numpy(rows)
    targets = ids[:, 1:].contiguous()
    weight = int((targets != IGNORE_INDEX).sum())
    return Batch({"tokens": ids[:, :-1].contiguous(), "targets": targets}, weight=weight, tokens=targets.numel())


class PretrainSource:
    """Rows `rows_seen`, `rows_seen` + 1, ... of the derived order; each rank takes every dp_size-th."""

    def __init__(self, rows: TokenRows | MixtureRows, plan: TrainPlan, dp_rank: int = 0) -> None:
        self._rows, self._plan, self._dp_rank = rows, plan, dp_rank
        self.rows_seen = 0

    def next_step(self) -> list[Batch]:
        plan = self._plan
        count = plan.rows_at(self.rows_seen * plan.seq_len)
        numbers = np.arange(self.rows_seen + self._dp_rank, self.rows_seen + count, plan.dp_size)
        self.rows_seen += count
        ids = self._rows.get(numbers)
        return [lm_batch(ids[i : i + plan.micro_batch_size]) for i in range(0, len(ids), plan.micro_batch_size)]

    def state_dict(self) -> dict[str, Any]:
        return {"rows_seen": self.rows_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows_seen = int(state["rows_seen"])


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

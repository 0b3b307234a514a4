"""Giving every row one token: what the scheduler asks of a step that is made once and called many times."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from gptcli.model import GPT, KVCache


class Decode(ABC):
    """A forward of one token per row over the first rows of a cache."""

    def __init__(self, model: GPT, dtype: torch.dtype = torch.float32) -> None:
        self._config, self._device, self._dtype = model.config, model.wte.weight.device, dtype
        self._spare: KVCache | None = None

    def size(self, rows: int, room: int) -> tuple[int, int]:
        """Rows and capacity of the cache for so many rows and tokens in each."""
        return rows, room

    def take(self, batch: int, capacity: int) -> KVCache:
        """An empty cache: the last one that was given back, with its graph, if it has that size."""
        spare, self._spare = self._spare, None
        if spare is not None and (spare.batch, spare.capacity) == (batch, capacity):
            return spare
        return KVCache(self._config, batch, capacity, device=self._device, dtype=self._dtype)

    def give_back(self, cache: KVCache) -> None:
        """No row is in it any more."""
        self._spare = cache

    def __call__(self, tokens: Sequence[int], cache: KVCache) -> Tensor:
        """(rows, V): what follows `tokens`, one for each of the cache's first rows; on a GPU until the next call."""
        logits = self._logits(tokens, cache)
        for row in range(len(tokens)):
            cache.set_length(row, cache.length(row) + 1)
        return logits

    @abstractmethod
    def _logits(self, tokens: Sequence[int], cache: KVCache) -> Tensor:
        """The same, before the rows' lengths are counted on."""

"""Keys and values of tokens already seen. An argument of forward, never state of the model.

Each row has a length of its own, and its tokens sit in slots 0, 1, 2, ... without holes, whatever padding they
came with. So a slot is also a position, causality is `key slot <= query slot`, and rows may be ragged.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptcli.config.schema import ModelConfig


@dataclass(frozen=True)
class CacheStep:
    """Where the tokens of one forward go: slots (B, T), the last slot + 1 of any row, tokens per row."""

    slots: Tensor
    counts: list[int]
    start: int
    end: int
    uniform: bool
    keep: Tensor | None


class KVCache:
    """Room for `capacity` tokens in each of `batch` rows; (B, kv heads, capacity + 1, D) per layer and kind.

    The slot after the last is where padding is thrown. Lengths are kept on the host, so that no step waits for
    the device to know its shapes.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (batch, config.kv_heads, capacity + 1, config.head_dim)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.capacity, self.batch, self.first = capacity, batch, 0
        self._lengths = [0] * batch  # shared with the views that `rows` gives

    @property
    def lengths(self) -> list[int]:
        return self._lengths[self.first : self.first + self.batch]

    def length(self, row: int) -> int:
        return self._lengths[self.first + row]

    @property
    def memory(self) -> list[Tensor]:
        return [*self.k, *self.v]

    def is_in(self, memory: Sequence[Tensor]) -> bool:
        """Whether it is still kept in the very tensors that `memory` gave once."""
        now = self.memory
        return len(now) == len(memory) and all(a is b for a, b in zip(now, memory, strict=True))

    # ---- one forward ---------------------------------------------------------------------------------------

    def begin(self, tokens: Tensor, attention_mask: Tensor | None) -> CacheStep:
        """Slots for `tokens` (B, T), of which only those kept by attention_mask (B, T) are stored."""
        B, T = tokens.shape
        lengths = self.lengths
        longest = max(lengths)
        if longest + T > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {longest + T} are needed")
        if attention_mask is None:
            if min(lengths) == longest:
                slots = torch.arange(longest, longest + T, device=tokens.device).expand(B, T)
                return CacheStep(slots, [T] * B, longest, longest + T, True, None)
            starts = torch.tensor(lengths, device=tokens.device)
            slots = starts[:, None] + torch.arange(T, device=tokens.device)
            return CacheStep(slots, [T] * B, longest, longest + T, False, torch.ones_like(tokens, dtype=torch.bool))
        keep = attention_mask.bool()
        starts = torch.tensor(lengths, device=tokens.device)
        slots = (starts[:, None] + keep.cumsum(1) - 1).clamp(min=0)
        return CacheStep(slots, keep.sum(1).tolist(), longest, longest + T, False, keep)

    def update(self, layer: int, k: Tensor, v: Tensor, step: CacheStep) -> tuple[Tensor, Tensor]:
        """Store k, v (B, H, T, D) of one layer; returns all keys and values up to the longest row."""
        K, V = self.k[layer], self.v[layer]
        if step.uniform:
            K[:, :, step.start : step.end] = k
            V[:, :, step.start : step.end] = v
        else:
            assert step.keep is not None
            rows = torch.arange(k.shape[0], device=k.device)[:, None]
            slots = torch.where(step.keep, step.slots, self.capacity)
            K[rows, :, slots] = k.transpose(1, 2).to(K.dtype)
            V[rows, :, slots] = v.transpose(1, 2).to(V.dtype)
        return K[:, :, : step.end], V[:, :, : step.end]

    def advance(self, step: CacheStep) -> None:
        for i, count in enumerate(step.counts):
            self._lengths[self.first + i] += count

    # ---- rows ----------------------------------------------------------------------------------------------

    def rows(self, start: int, stop: int) -> KVCache:
        """These rows alone, in the same memory: what a forward adds to them is added here."""
        view = copy.copy(self)
        view.k, view.v = [k[start:stop] for k in self.k], [v[start:stop] for v in self.v]
        view.first, view.batch = self.first + start, stop - start
        return view

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may be taken several times (beams)."""
        index = torch.tensor(rows, device=self.k[0].device)
        longest = max(self.lengths[row] for row in rows)
        for kind in (self.k, self.v):
            for layer, stored in enumerate(kind):
                chosen = stored[index, :, :longest]
                if len(rows) != self.batch:
                    kind[layer] = stored.new_zeros(len(rows), *stored.shape[1:])
                kind[layer][:, :, :longest] = chosen
        self._lengths, self.batch, self.first = [self.lengths[row] for row in rows], len(rows), 0

    def copy_row(self, source: int, target: int, length: int | None = None) -> None:
        """The first `length` tokens of a row (all of them) take the place of another's."""
        length = self.length(source) if length is None else length
        for kind in (self.k, self.v):
            for stored in kind:
                stored[target, :, :length] = stored[source, :, :length]
        self.set_length(target, length)

    def set_length(self, row: int, length: int) -> None:
        """Forget a row's tokens from `length` on."""
        self._lengths[self.first + row] = length

    def grow(self, batch: int, capacity: int) -> None:
        """At least so much room; what is stored stays."""
        batch, capacity = max(batch, self.batch), max(capacity, self.capacity)
        if (batch, capacity) == (self.batch, self.capacity):
            return
        longest = max(self._lengths)
        for kind in (self.k, self.v):
            for layer, stored in enumerate(kind):
                H, D = stored.shape[1], stored.shape[3]
                kind[layer] = stored.new_zeros(batch, H, capacity + 1, D)
                kind[layer][: self.batch, :, :longest] = stored[:, :, :longest]
        self._lengths += [0] * (batch - self.batch)
        self.batch, self.capacity = batch, capacity


class SlotView:
    """A cache's memory (B, kv heads, S, D) for one token per row, whose slots (B, 1) are given as a tensor.

    Nothing is counted on the host, so a forward with it can be compiled or captured: all S slots are read, and those
    beyond a row's own are masked.
    """

    def __init__(self, k: list[Tensor], v: list[Tensor], slots: Tensor) -> None:
        self.k, self.v, self.slots = k, v, slots

    def begin(self, tokens: Tensor, attention_mask: Tensor | None) -> CacheStep:
        assert attention_mask is None
        return CacheStep(self.slots, [], 0, self.k[0].shape[2], False, None)

    def update(self, layer: int, k: Tensor, v: Tensor, step: CacheStep) -> tuple[Tensor, Tensor]:
        rows = torch.arange(k.shape[0], device=k.device)
        for stored, new in ((self.k[layer], k), (self.v[layer], v)):
            # as an index, which torch.compile writes in place; a scatter copies the whole cache
            stored[rows, :, step.slots[:, 0]] = new[:, :, 0].to(stored.dtype)
        return self.k[layer], self.v[layer]

    def advance(self, step: CacheStep) -> None:
        """Whoever made the slots counts the lengths."""


Cache = KVCache | SlotView

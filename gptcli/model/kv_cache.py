"""Keys and values of tokens already seen. An argument of forward, never state of the model.

Each row has a length of its own, and its tokens sit in slots 0, 1, 2, ... without holes, whatever padding they
came with. So a slot is also a position, causality is `key slot <= query slot`, and rows may be ragged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptcli.config.schema import ModelConfig


@dataclass(frozen=True)
class CacheStep:
    """Where the tokens of one forward go: slots (B, T), the last slot + 1 of any row, tokens per row (B,)."""

    slots: Tensor
    counts: Tensor | int
    start: int
    end: int
    uniform: bool
    keep: Tensor | None


class KVCache:
    """Room for `capacity` tokens in each of `batch` rows; (B, kv heads, capacity + 1, D) per layer and kind.

    The slot after the last is where padding is thrown.
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
        self.capacity = capacity
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        # Host-side bounds, so that no step waits for the device.
        self.max_length = 0
        self.uniform = True  # every row has exactly max_length tokens

    def begin(self, tokens: Tensor, attention_mask: Tensor | None) -> CacheStep:
        """Slots for `tokens` (B, T), of which only those kept by attention_mask (B, T) are stored."""
        B, T = tokens.shape
        end = self.max_length + T
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {end} are needed")
        uniform = self.uniform and attention_mask is None
        if uniform:
            slots = torch.arange(self.max_length, end, device=tokens.device).expand(B, T)
            return CacheStep(slots, T, self.max_length, end, True, None)
        keep = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        counts = keep.sum(1)
        slots = (self.lengths[:, None] + keep.cumsum(1) - 1).clamp(min=0)
        return CacheStep(slots, counts, self.max_length, end, False, keep)

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
        self.lengths = self.lengths + step.counts
        self.max_length = step.end
        self.uniform = step.uniform

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be taken several times (beams, samples of one prompt)."""
        self.k = [k[rows] for k in self.k]
        self.v = [v[rows] for v in self.v]
        self.lengths = self.lengths[rows]

    def tighten(self, max_length: int) -> None:
        """Tell the true longest length after ragged steps, which the host can only bound."""
        self.max_length = max_length

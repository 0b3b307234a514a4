"""What the training loop and the stages agree on. A stage is a BatchSource and an Objective around one loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gptcli.model.logprobs import IGNORE_INDEX

__all__ = ["IGNORE_INDEX", "Batch", "BatchSource", "LossSum", "Objective"]


@dataclass(frozen=True)
class Batch:
    """One micro-batch. `weight` is the number of terms its loss sums over (tokens, pairs, ...); `tokens` counts
    the real tokens in it, for throughput and token-counted schedules."""

    tensors: Mapping[str, Tensor]
    weight: float
    tokens: int

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def to(self, device: torch.device) -> Batch:
        """On a GPU from pinned memory, without which the host would wait for all that the GPU has still to do."""
        pinned = {n: t.pin_memory() if device.type == "cuda" and not t.is_cuda else t for n, t in self.tensors.items()}
        moved = {name: t.to(device, non_blocking=True) for name, t in pinned.items()}
        return Batch(moved, self.weight, self.tokens)


@dataclass(frozen=True)
class LossSum:
    """An objective's result: sums over the batch, never means, so that they add up over micro-batches and ranks."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class BatchSource(Protocol):
    """Gives each rank its micro-batches; equally many on every rank."""

    def next_step(self) -> list[Batch]:
        """The micro-batches of this rank's share of one optimizer step."""

    def state_dict(self) -> dict[str, Any]:
        """The position in the data: JSON, and tensors where no JSON would do."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


# Exactly one forward of exactly one trainable model; whatever is frozen happens in the source.
Objective = Callable[[nn.Module, Batch], LossSum]

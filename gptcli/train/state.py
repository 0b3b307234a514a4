"""Where a training stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TrainState:
    """Changed by the loop alone, saved with every checkpoint."""

    step: int = 0  # optimizer updates done
    tokens_seen: int = 0
    best_val_loss: float | None = None
    best_step: int | None = None
    stopped: bool = False  # before the plan's end: validation got no better

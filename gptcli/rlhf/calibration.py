"""How good a reward model's scores are on pairs it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptcli.rlhf.comparisons import pair_tensors
from gptcli.rlhf.preferences import Comparison
from gptcli.train.objectives.reward import agreement, pair_loss

BINS = 10


def judge_scores(scores: Tensor, comparisons: Sequence[Comparison]) -> dict[str, float]:
    """Figures of the scores (N,) of all responses, in order."""
    pairs = pair_tensors(comparisons)
    delta, p, share = scores[pairs["better"]] - scores[pairs["worse"]], pairs["p"], pairs["share"]
    total = share.sum()
    return {
        "val_loss": ((pair_loss(delta, p) * share).sum() / total).item(),
        "val_accuracy": ((agreement(delta, p) * share).sum() / total).item(),
        "val_calibration_error": calibration_error(delta.sigmoid(), p),
    }


def calibration_error(predicted: Tensor, p: Tensor) -> float:
    """The mean distance between how sure the model is and how often it is right, over bins of its confidence."""
    sure = torch.maximum(predicted, 1 - predicted)
    right = torch.where(predicted >= 0.5, p, 1 - p)
    bins = ((sure - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    error = sum((sure[bins == b] - right[bins == b]).sum().abs() for b in range(BINS))
    return float(error / len(sure))


def histogram(scores: Tensor, comparisons: Sequence[Comparison], bins: int = 20) -> dict[str, Any]:
    """Counts of the scores of better and of worse responses between common edges."""
    pairs = pair_tensors(comparisons)
    low, high = scores.min().item(), max(scores.max().item(), scores.min().item() + 1e-6)
    counts = {name: scores[pairs[name]].histc(bins, low, high).long().tolist() for name in ("better", "worse")}
    return {"edges": torch.linspace(low, high, bins + 1).tolist(), **counts}

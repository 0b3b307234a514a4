"""A reward model from preferences: the Bradley-Terry likelihood of pairs, of rankings all their pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from gptcli.contracts import Batch, LossSum


@dataclass(frozen=True)
class BradleyTerry:
    """-log sigmoid(score of the better - score of the worse - margin); with labels p, the expectation over them.

    Batch: tokens (N, T), last (N,): where each row ends; better, worse: rows of each pair (P,), p, margin, share (P,).
    """

    margins: bool = True

    def __call__(self, model: nn.Module, batch: Batch) -> LossSum:
        scores = model(batch["tokens"], last_only=True).scalars["reward"][..., 0]
        scores = scores.float().gather(1, batch["last"][:, None])[:, 0]
        delta, share = scores[batch["better"]] - scores[batch["worse"]], batch["share"]
        loss = pair_loss(delta, batch["p"], batch["margin"] if self.margins else 0.0)
        metrics = {"accuracy": (agreement(delta, batch["p"]) * share).sum(), "score_gap": (delta * share).sum()}
        return LossSum((loss * share).sum(), metrics)


def pair_loss(delta: Tensor, p: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """Cross-entropy of sigmoid(delta - margin) against p: ln 2 where nothing is known."""
    return F.binary_cross_entropy_with_logits(delta - margin, p, reduction="none")


def agreement(delta: Tensor, p: Tensor) -> Tensor:
    """The probability that the label is what delta's sign says; a tie is half right."""
    right = 0.5 + 0.5 * delta.sign()
    return p * right + (1 - p) * (1 - right)

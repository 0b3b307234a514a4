"""Direct preference optimization (Rafailov et al. 2023) and its relatives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gptcli.contracts import IGNORE_INDEX, Batch, LossSum
from gptcli.train.objectives.reward import agreement, pair_loss


@dataclass(frozen=True)
class DPO:
    """sigmoid: cross-entropy of beta * delta against p. conservative: the same with labels that are wrong now and then
    (Mitchell 2023). ipo: (delta - 1 / (2 beta))^2 (Azar et al. 2024, equation 17).

    delta is how much more than the reference the policy prefers the better response. per_token averages
    log-probabilities over a response's tokens, as TRL's ipo does; the papers sum.
    Batch: tokens, targets (N, T), ref_logprobs (N, T); better, worse, p, share (P,).
    """

    beta: float
    loss: str = "sigmoid"
    label_smoothing: float = 0.0
    per_token: bool = False

    def __call__(self, model: nn.Module, batch: Batch) -> LossSum:
        out = model(batch["tokens"], targets=batch["targets"])
        gain = out.logprobs - batch["ref_logprobs"]
        mask = batch["targets"] != IGNORE_INDEX
        gain = torch.where(mask, gain, 0.0).sum(1)  # (N,): log-ratio of each response
        if self.per_token:
            gain = gain / mask.sum(1)
        better, worse, p, share = gain[batch["better"]], gain[batch["worse"]], batch["p"], batch["share"]
        loss = preference_loss(better - worse, p, self.beta, self.loss, self.label_smoothing)
        metrics = {
            "accuracy": (agreement(better - worse, p) * share).sum(),
            "reward_gap": (self.beta * (better - worse) * share).sum(),
            "reward_better": (self.beta * better * share).sum(),
        }
        return LossSum((loss * share).sum(), metrics)


def preference_loss(delta: Tensor, p: Tensor, beta: float, loss: str, label_smoothing: float) -> Tensor:
    """Of each pair; `p` is the probability that the first is the better one."""
    if loss == "ipo":
        aim = 1 / (2 * beta)
        return p * (delta - aim).square() + (1 - p) * (delta + aim).square()
    if loss == "conservative":
        p = p * (1 - label_smoothing) + (1 - p) * label_smoothing
    return pair_loss(beta * delta, p)

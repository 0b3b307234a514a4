"""GRPO (Shao et al. 2024), Dr. GRPO (Liu et al. 2025) and RLOO (Ahmadian et al. 2024): no value network, the other
responses to a prompt say what a response is worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gptcli.contracts import IGNORE_INDEX, Batch, LossSum
from gptcli.train.objectives.ppo import clipped_loss, is_clipped


@dataclass(frozen=True)
class GRPO:
    """The clipped policy loss, with a ratio for each token or one for the response, and a KL loss if there is one.

    Batch: tokens, targets, logprobs, ref_logprobs (B, T), advantages (B,). `weight` says what sums are divided by.
    """

    clip_range: float
    temperature: float
    ratio: str  # token | sequence
    normalization: str  # token | sequence | constant
    max_new_tokens: int
    kl_coef: float = 0.0
    kl_loss: Callable[[Tensor, Tensor], Tensor] | None = None  # of log-probabilities and the reference's

    def __call__(self, model: nn.Module, batch: Batch) -> LossSum:
        out = model(batch["tokens"], targets=batch["targets"], temperature=self.temperature)
        mask = batch["targets"] != IGNORE_INDEX
        log_ratio = torch.where(mask, out.logprobs - batch["logprobs"], 0.0)
        advantages = batch["advantages"]
        if self.ratio == "sequence":
            ratio = log_ratio.sum(1).exp()
            loss = clipped_loss(ratio, advantages, self.clip_range).sum()
            clipped = is_clipped(ratio, self.clip_range).sum()
        else:
            ratio = log_ratio.exp()
            loss = self._sum(clipped_loss(ratio, advantages[:, None], self.clip_range), mask)
            clipped = per_response(is_clipped(ratio, self.clip_range), mask).sum() * self.weight(mask) / len(mask)
        if self.kl_loss is not None:
            loss = loss + self.kl_coef * self._sum(self.kl_loss(out.logprobs, batch["ref_logprobs"]), mask)
        return LossSum(loss, {"clip_fraction": clipped})

    def weight(self, mask: Tensor) -> int:
        """All tokens count alike (DAPO), or all responses do."""
        return int(mask.sum()) if self.normalization == "token" and self.ratio == "token" else len(mask)

    def _sum(self, x: Tensor, mask: Tensor) -> Tensor:
        """Over tokens; over responses of their mean (GRPO), which favours short right and long wrong ones; over
        responses of their sum by a constant (Dr. GRPO)."""
        if self.normalization == "sequence":
            return per_response(x, mask).sum()
        return x[mask].sum() / (self.max_new_tokens if self.normalization == "constant" else 1)


def per_response(x: Tensor, mask: Tensor) -> Tensor:
    """(B,): means over each response's tokens."""
    return torch.where(mask, x, 0.0).sum(1) / mask.sum(1)

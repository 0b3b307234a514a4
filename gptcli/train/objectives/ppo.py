"""Proximal policy optimization (Schulman et al. 2017) on the tokens of a rollout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gptcli.contracts import IGNORE_INDEX, Batch, LossSum


@dataclass(frozen=True)
class PPO:
    """Clipped policy loss plus clipped value loss, summed over the response's tokens.

    Batch, all (B, T): tokens, targets; logprobs and values as they were at the rollout; advantages, returns.
    """

    clip_range: float
    value_clip: float
    value_coef: float
    temperature: float

    def __call__(self, model: nn.Module, batch: Batch) -> LossSum:
        out = model(batch["tokens"], targets=batch["targets"], temperature=self.temperature)
        mask = batch["targets"] != IGNORE_INDEX  # nothing outside it enters, not even times 0: it may be no number
        old = {name: batch[name][mask] for name in ("logprobs", "values", "advantages", "returns")}
        ratio = (out.logprobs[mask] - old["logprobs"]).exp()
        policy_loss = clipped_loss(ratio, old["advantages"], self.clip_range).sum()
        values = out.scalars["value"][..., 0][mask]
        value_loss = clipped_value_loss(values, old["values"], old["returns"], self.value_clip).sum()
        metrics = {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "clip_fraction": is_clipped(ratio, self.clip_range).sum(),
            "approx_kl": (ratio - 1 - ratio.log()).sum(),  # moved since the rollout
        }
        return LossSum(policy_loss + self.value_coef * value_loss, metrics)


def clipped_loss(ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)


def is_clipped(ratio: Tensor, clip_range: float) -> Tensor:
    return ((ratio - 1).abs() > clip_range).float()


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error, or what it is with the value kept within `clip` of the old one, if that is larger."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())

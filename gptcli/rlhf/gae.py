"""Advantages: generalized advantage estimation for PPO, and what a group of responses says for GRPO and RLOO."""

from __future__ import annotations

import torch
from torch import Tensor

from gptcli.rlhf.sequences import last_index

EPSILON = 1e-8


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float) -> Tensor:
    """Advantages (B, T) where mask is True, 0 elsewhere (Schulman et al. 2016, equation 16).

    A row's True positions stand together; after the last of them there is nothing more to come.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    following = values.new_zeros(values.shape[0])
    next_value = values.new_zeros(values.shape[0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = torch.where(mask[:, t], delta + gamma * gae_lambda * following, 0.0)
        next_value = values[:, t]
        advantages[:, t] = following
    return advantages


def whiten(x: Tensor, mask: Tensor, *, keep_mean: bool = False) -> Tensor:
    """x scaled to variance 1 and, unless kept, shifted to mean 0, over the True positions; 0 elsewhere."""
    kept = x[mask]
    mean = kept.mean()
    scaled = (x - mean) * (kept.var(correction=0) + EPSILON).rsqrt()
    return torch.where(mask, scaled + mean if keep_mean else scaled, 0.0)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """(B, T): each token pays for its KL, the last token of a response gets its score."""
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    return rewards.scatter_add(1, last_index(mask)[:, None], scores[:, None])


def group_advantages(rewards: Tensor, group_size: int, *, baseline: str, scale: str) -> Tensor:
    """(R,): rewards less their group's mean, or less the mean of the others (RLOO), over a standard deviation.

    Groups are consecutive. GRPO adds 1e-4 to the deviation, so that equal rewards give 0 and not noise.
    """
    groups = rewards.view(-1, group_size)
    advantages = groups - groups.mean(1, keepdim=True)
    if baseline == "leave_one_out":  # r_i - mean of the others = (r_i - mean of all) * n / (n - 1)
        advantages = advantages * group_size / (group_size - 1)
    if scale == "group":
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-4)
    elif scale == "batch":
        advantages = advantages / (rewards.std() + 1e-4)
    return advantages.flatten()

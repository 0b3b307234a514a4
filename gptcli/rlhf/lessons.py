"""What PPO and GRPO learn from a rollout: the tensors of their objectives, and figures to log."""

from __future__ import annotations

import torch
from torch import Tensor

from gptcli.config.schema import GRPOBlock, PPOBlock
from gptcli.rlhf.gae import gae, group_advantages, token_rewards, whiten
from gptcli.rlhf.rollout import Rollout


def ppo_lesson(rollout: Rollout, kl_coef: float, block: PPOBlock) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Rewards that the KL is taken off, token by token; advantages over the values; returns for the value head."""
    mask = rollout.mask
    rewards = token_rewards(rollout.scores, rollout.kl, mask, kl_coef)
    if block.whiten_rewards:
        rewards = whiten(rewards, mask, keep_mean=True)
    advantages = gae(rewards, rollout.values, mask, gamma=block.gamma, gae_lambda=block.gae_lambda)
    returns = torch.where(mask, advantages + rollout.values, 0.0)
    if block.whiten:
        advantages = whiten(advantages, mask)
    unexplained = (returns - rollout.values)[mask].var(correction=0)
    explained = 1 - unexplained / returns[mask].var(correction=0).clamp(min=1e-8)
    tensors = {"logprobs": rollout.logprobs, "values": rollout.values, "advantages": advantages, "returns": returns}
    return tensors, {"explained_variance": explained.item()}


def group_lesson(rollout: Rollout, kl_coef: float, block: GRPOBlock) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Advantages over the group; with k1 the reward of a response pays for its KL first."""
    price = kl_coef if block.kl_estimator == "k1" else 0.0
    rewards = rollout.scores - price * rollout.kl.sum(1)
    advantages = group_advantages(rewards, block.group_size, baseline=block.baseline, scale=block.scale)
    tensors = {"logprobs": rollout.logprobs, "ref_logprobs": rollout.ref_logprobs, "advantages": advantages}
    spread = rollout.scores.view(-1, block.group_size).std(1)
    return tensors, {"groups_alike": (spread == 0).float().mean().item()}

"""`gpt rlhf-ppo`: a policy learns from scores of its own responses, held near the reference it started as."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from gptcli.config.schema import PPORecipe
from gptcli.rlhf.kl import KLController
from gptcli.rlhf.lessons import ppo_lesson
from gptcli.stages.job import Job
from gptcli.stages.rollouts import Method, run_rollouts
from gptcli.train.objectives.ppo import PPO


def run(job: Job[PPORecipe]) -> dict[str, Any]:
    block = job.recipe.ppo
    method = Method(
        block=block,
        heads={"value": 0.0},  # it begins by saying nothing
        lesson=partial(ppo_lesson, block=block),
        objective=PPO(block.clip_range, block.value_clip, block.value_coef, job.recipe.sampling.temperature),
        kl=KLController(block.kl_coef, block.kl_target, block.kl_horizon),
        group_size=1,
        epochs=block.ppo_epochs,
        weight=response_tokens,
    )
    return run_rollouts(job, method)


def response_tokens(mask: Tensor) -> int:
    return int(mask.sum())

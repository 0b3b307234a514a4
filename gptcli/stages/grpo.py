"""`gpt rlhf-grpo`: GRPO, Dr. GRPO and RLOO, where the other responses to a prompt take the value network's place."""

from __future__ import annotations

from functools import partial
from typing import Any

from gptcli.config.schema import GRPORecipe
from gptcli.rlhf.kl import LOSSES, KLController
from gptcli.rlhf.lessons import group_lesson
from gptcli.stages.job import Job
from gptcli.stages.rollouts import Method, run_rollouts
from gptcli.train.objectives.grpo import GRPO


def run(job: Job[GRPORecipe]) -> dict[str, Any]:
    block, sampling = job.recipe.grpo, job.recipe.sampling
    objective = GRPO(
        clip_range=block.clip_range,
        temperature=sampling.temperature,
        ratio=block.ratio,
        normalization=block.normalization,
        max_new_tokens=sampling.max_new_tokens,
        kl_coef=block.kl_coef,
        kl_loss=LOSSES.get(block.kl_estimator) if block.kl_coef else None,
    )
    method = Method(
        block=block,
        heads={},
        lesson=partial(group_lesson, block=block),
        objective=objective,
        kl=KLController(block.kl_coef),
        group_size=block.group_size,
        epochs=block.epochs,
        weight=objective.weight,
    )
    return run_rollouts(job, method)

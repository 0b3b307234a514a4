"""`gpt rlhf-ppo`: a policy learns from scores of its own responses, held near the reference it started as."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from gptcli.config.schema import PPORecipe
from gptcli.dist.runtime import Runtime
from gptcli.rlhf.kl import KLController
from gptcli.rlhf.lessons import ppo_lesson
from gptcli.stages.console import RunConsole
from gptcli.stages.rollouts import Method, run_rollouts
from gptcli.train.objectives.ppo import PPO


def run(
    recipe: PPORecipe,
    runtime: Runtime,
    console: RunConsole,
    *,
    resume: Path | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train and return the summary. `resume` is a run directory whose latest checkpoint to go on from."""
    block = recipe.ppo
    method = Method(
        block=block,
        heads={"value": 0.0},  # it begins by saying nothing
        lesson=partial(ppo_lesson, block=block),
        objective=PPO(block.clip_range, block.value_clip, block.value_coef, recipe.sampling.temperature),
        kl=KLController(block.kl_coef, block.kl_target, block.kl_horizon),
        group_size=1,
        epochs=block.ppo_epochs,
        weight=response_tokens,
    )
    return run_rollouts(recipe, method, runtime, console, resume=resume, dry_run=dry_run)


def response_tokens(mask: Tensor) -> int:
    return int(mask.sum())

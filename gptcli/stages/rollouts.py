"""What `gpt rlhf-ppo` and `gpt rlhf-grpo` share: a policy that learns from scores of its own responses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from gptcli.config.schema import GRPORecipe, PPORecipe
from gptcli.config.tuning import RolloutBlock
from gptcli.contracts import Objective
from gptcli.errors import UserError
from gptcli.generate import Engine
from gptcli.generate.prompts import read_jobs
from gptcli.modeldir import load_model
from gptcli.rlhf.kl import KLController
from gptcli.rlhf.rewards import Rewards
from gptcli.rlhf.rollout import Lesson, Prompt, RolloutSource
from gptcli.stages.frozen import data_files, fingerprint, policy
from gptcli.stages.job import Job


@dataclass(frozen=True)
class Method:
    """How it learns. heads: scalar heads of the policy and the standard deviation they begin with."""

    block: RolloutBlock
    heads: Mapping[str, float]
    lesson: Lesson
    objective: Objective
    kl: KLController
    group_size: int
    epochs: int
    weight: Callable[[Tensor], int]


def run_rollouts(job: Job[PPORecipe] | Job[GRPORecipe], method: Method) -> dict[str, Any]:
    recipe, runtime = job.recipe, job.runtime
    tokenizer = job.base.require_tokenizer()
    started = job.start(tokenizer, fingerprint(recipe), partial(policy, job, method.heads))
    plan, engine = started.plan(), Engine(started.model, tokenizer, dtype=job.dtype)
    source = RolloutSource(
        started.model,
        load_model(job.base, device=runtime.device).requires_grad_(False),
        engine,
        read_prompts(recipe, engine, job.say),
        Rewards(recipe.reward, tokenizer, runtime, job.dtype),
        method.lesson,
        method.kl,
        block=method.block,
        sampling=recipe.sampling,
        group_size=method.group_size,
        epochs=method.epochs,
        weight=method.weight,
        plan=plan,
        runtime=runtime,
        seed=recipe.run.seed,
        dtype=job.dtype,
    )
    summary = started.train(plan, source, method.objective, figures=lambda: source.metrics)
    return {**summary, **source.metrics}


def read_prompts(recipe: PPORecipe | GRPORecipe, engine: Engine, say: Callable[[str], None]) -> list[Prompt]:
    """Text and ids of every prompt of the data. Raises UserError, file and line, for one that leaves no room."""
    bad: list[UserError] = []

    def on_bad(error: UserError) -> None:
        if not recipe.data.skip_bad:
            raise error
        bad.append(error)

    params = dataclasses.replace(recipe.sampling, on_overflow="refuse")
    prompts = []
    for file in data_files(recipe.data):
        for job in read_jobs(str(file), params, engine.require_tokenizer(), on_bad=on_bad):
            try:
                if job.changes:
                    raise UserError(f"{job.where}: {next(iter(job.changes))}: rollouts are drawn as `sampling:` says")
                engine.check(job.feed, params)
            except UserError as error:
                text = str(error)
                on_bad(error if text.startswith(job.where) else UserError(f"{job.where}: {text}"))
            else:
                prompts.append((job.prompt, engine.encode_prompt(job.feed)))
    if bad:
        say(f"left out {len(bad)} bad prompts; the first: {bad[0]}")
    if not prompts:
        raise UserError('data: no prompts; name .jsonl files of {"prompt"} or {"messages"} in data.train')
    return prompts

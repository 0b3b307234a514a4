"""What `gpt rlhf-ppo` and `gpt rlhf-grpo` share: a policy that learns from scores of its own responses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from gptcli.config.schema import GRPORecipe, PPORecipe
from gptcli.config.tuning import RolloutBlock
from gptcli.contracts import Objective
from gptcli.errors import UserError
from gptcli.generate import Engine
from gptcli.generate.prompts import read_jobs
from gptcli.modeldir import load_model
from gptcli.rlhf.held_out import HeldOut
from gptcli.rlhf.kl import KLController
from gptcli.rlhf.rewards import Rewards
from gptcli.rlhf.rollout import Lesson, Prompt, RolloutSource, Sampler
from gptcli.stages.frozen import data_files, fingerprint, held_out_files, policy
from gptcli.stages.job import Job, Started

PROMPTS = (".jsonl", ".txt", ".md")  # files of prompts, in a folder


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
    started = job.start(tokenizer, fingerprint(recipe, PROMPTS), partial(policy, job, method.heads))
    reference = load_model(job.base, device=runtime.device).requires_grad_(False)
    plan, engine = started.plan(), Engine(started.model, tokenizer, dtype=job.dtype)
    if job.compiles:
        engine.compile()
    sampler = partial(
        Sampler,
        reference=reference,
        rewards=Rewards(recipe.reward, tokenizer, runtime, job.dtype),
        block=method.block,
        sampling=recipe.sampling,
        judged_together=plan.micro_batch_size,
        runtime=runtime,
    )
    by_policy, by_reference = sampler(engine), sampler(Engine(reference, tokenizer, dtype=job.dtype))
    source = RolloutSource(
        by_policy,
        read_prompts(recipe, data_files(recipe.data, PROMPTS), engine, job.say),
        method.lesson,
        method.kl,
        rollout_batch_size=method.block.rollout_batch_size,
        group_size=method.group_size,
        epochs=method.epochs,
        weight=method.weight,
        plan=plan,
        runtime=runtime,
        seed=recipe.run.seed,
    )
    held_out = _held_out(started, engine, by_policy, by_reference, method.block.best_of)
    summary = started.train(
        plan,
        source,
        method.objective,
        widths_stay=False,
        measure=held_out.measure if held_out else None,
        figures=lambda: source.metrics,
    )
    return {**summary, **source.metrics}


def _held_out(
    started: Started, engine: Engine, by_policy: Sampler, by_reference: Sampler, best_of: int
) -> HeldOut | None:
    """What is written to data.val, where there is some."""
    job, resumed = started.job, started.resumed
    recipe = job.recipe
    if not (recipe.data.val and recipe.train.eval_every):
        return None
    judge = recipe.held_out_reward
    return HeldOut(
        by_policy,
        by_reference,
        None if judge is None else Rewards(judge, started.tokenizer, job.runtime, job.dtype, key="held_out_reward"),
        read_prompts(recipe, held_out_files(recipe.data, PROMPTS), engine, job.say),
        job.run_dir,
        rows=recipe.train.eval_rows,
        best_of=best_of,
        resume_step=resumed.state.step if resumed else 0,
        runtime=job.runtime,
        seed=recipe.run.seed,
        say=job.say,
    )


def read_prompts(
    recipe: PPORecipe | GRPORecipe, files: Sequence[Path], engine: Engine, say: Callable[[str], None]
) -> list[Prompt]:
    """Text and ids of every prompt of the files. Raises UserError, file and line, for one that leaves no room."""
    bad: list[UserError] = []

    def on_bad(error: UserError) -> None:
        if not recipe.data.skip_bad:
            raise error
        bad.append(error)

    params = dataclasses.replace(recipe.sampling, on_overflow="refuse")
    prompts = []
    for file in files:
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

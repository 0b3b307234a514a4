"""What `gpt rlhf-ppo` and `gpt rlhf-grpo` share: a policy that learns from scores of its own responses."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gptcli.config.schema import GRPORecipe, PPORecipe
from gptcli.config.tuning import RolloutBlock
from gptcli.contracts import Objective
from gptcli.dist.runtime import Runtime, pick_precision
from gptcli.errors import UserError
from gptcli.generate import Engine
from gptcli.generate.prompts import read_jobs
from gptcli.modeldir import load_model, open_model_dir
from gptcli.rlhf.held_out import HeldOut
from gptcli.rlhf.kl import KLController
from gptcli.rlhf.rewards import Rewards
from gptcli.rlhf.rollout import Lesson, Prompt, RolloutSource, Sampler
from gptcli.stages.build import open_run_dir, pick_plan, pinned, start_model
from gptcli.stages.console import RunConsole
from gptcli.stages.frozen import builder, data_files, fingerprint, held_out_files
from gptcli.stages.run import TrainingRun
from gptcli.train.checkpoint import find_checkpoint
from gptcli.train.optim import make_optimizer


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


def run_rollouts(
    recipe: PPORecipe | GRPORecipe,
    method: Method,
    runtime: Runtime,
    console: RunConsole,
    *,
    resume: Path | None,
    dry_run: bool,
) -> dict[str, Any]:
    """Train and return the summary. `resume` is a run directory whose latest checkpoint to go on from."""
    recipe = pinned(recipe)
    assert recipe.init_from is not None
    with tempfile.TemporaryDirectory(prefix="gpt-dry-run-") if dry_run else nullcontext() as scratch:
        folder = open_model_dir(find_checkpoint(recipe.init_from))
        tokenizer, dtype = folder.require_tokenizer(), pick_precision(recipe.train.precision, runtime.device)
        data_hash = fingerprint(recipe)
        policy, resumed = start_model(
            recipe,
            tokenizer,
            data_hash,
            runtime,
            console.say,
            resume=resume,
            build=builder(recipe, method.heads, tokenizer, runtime, console.say),
        )
        engine = Engine(policy, tokenizer, dtype=dtype)
        reference = load_model(folder, device=runtime.device).requires_grad_(False)
        plan = pick_plan(recipe, policy.config, runtime, console.say, dtype=dtype)
        rewards = Rewards(recipe.reward, tokenizer, runtime, dtype)

        def sampler(of: Engine) -> Sampler:
            return Sampler(
                of,
                reference,
                rewards,
                block=method.block,
                sampling=recipe.sampling,
                judged_together=plan.micro_batch_size,
                runtime=runtime,
            )

        source = RolloutSource(
            sampler(engine),
            read_prompts(recipe, data_files(recipe.data), engine, console.say),
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
        run_dir = Path(scratch) if scratch else open_run_dir(recipe, runtime, resume=resume is not None)
        held_out = None
        if recipe.data.val and recipe.train.eval_every:
            judge = recipe.held_out_reward
            held_out = HeldOut(
                sampler(engine),
                sampler(Engine(reference, tokenizer, dtype=dtype)),
                None if judge is None else Rewards(judge, tokenizer, runtime, dtype, key="held_out_reward"),
                read_prompts(recipe, held_out_files(recipe.data), engine, console.say),
                run_dir,
                rows=recipe.train.eval_rows,
                best_of=method.block.best_of,
                resume_step=resumed.state.step if resumed else 0,
                runtime=runtime,
                seed=recipe.run.seed,
                say=console.say,
            )
        training = TrainingRun(
            recipe=recipe,
            runtime=runtime,
            console=console,
            run_dir=run_dir,
            model=policy,
            tokenizer=tokenizer,
            optimizer=make_optimizer(policy, recipe.optim, policy.hidden_matrices()),
            plan=plan,
            dtype=dtype,
            source=source,
            objective=method.objective,
            held_out=[],
            data_hash=data_hash,
            resumed=resumed,
            measure=None if held_out is None else lambda: held_out.measure(training.state.step),
            figures=lambda: source.metrics,
        )
        return {**training.execute(), **source.metrics}


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

"""`gpt rlhf-dpo`: a policy learns from preferences directly, held near the reference it started as."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from gptcli.config.schema import DPORecipe
from gptcli.contracts import Batch
from gptcli.dist.runtime import Runtime, pick_precision
from gptcli.generate import Engine
from gptcli.model import GPT
from gptcli.modeldir import load_model, open_model_dir
from gptcli.rlhf.comparisons import Collate, ComparisonSource, batches, responses_alone
from gptcli.rlhf.preferences import Comparison, length_accuracy
from gptcli.rlhf.reference import judge
from gptcli.stages.build import open_run_dir, pick_plan, pinned, start_model
from gptcli.stages.console import RunConsole
from gptcli.stages.frozen import builder, fingerprint
from gptcli.stages.preferences import read_preferences
from gptcli.stages.run import TrainingRun
from gptcli.train.checkpoint import find_checkpoint
from gptcli.train.loop import evaluate_all
from gptcli.train.objectives.dpo import DPO
from gptcli.train.optim import make_optimizer


def run(
    recipe: DPORecipe,
    runtime: Runtime,
    console: RunConsole,
    *,
    resume: Path | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train and return the summary. `resume` is a run directory whose latest checkpoint to go on from."""
    recipe = pinned(recipe)
    assert recipe.init_from is not None
    block = recipe.dpo
    with tempfile.TemporaryDirectory(prefix="gpt-dry-run-") if dry_run else nullcontext() as scratch:
        folder = open_model_dir(find_checkpoint(recipe.init_from))
        tokenizer, dtype = folder.require_tokenizer(), pick_precision(recipe.train.precision, runtime.device)
        data_hash = fingerprint(recipe)
        build = builder(recipe, {}, tokenizer, runtime, console.say)
        model, resumed = start_model(recipe, tokenizer, data_hash, runtime, console.say, resume=resume, build=build)
        data = read_preferences(recipe, Engine(model, tokenizer), console.say)
        reference = None
        if not block.reference_free:
            reference = load_model(folder, device=runtime.device).requires_grad_(False)
        collate = with_reference(reference, runtime.device, dtype)
        plan = pick_plan(recipe, model.config, runtime, console.say, dtype=dtype, texts_per_row=data.most)
        objective = DPO(block.beta, block.loss, block.label_smoothing, block.per_token)
        mine = data.held_out[runtime.dp_rank :: runtime.dp_size]
        held_out = batches(mine, collate, plan.micro_batch_size)
        baseline = length_accuracy(data.held_out)

        def measure() -> dict[str, Any]:
            figures = evaluate_all(model, held_out, objective, runtime, dtype=dtype)
            return {**{f"val_{name}": value for name, value in figures.items()}, "val_length_accuracy": baseline}

        training = TrainingRun(
            recipe=recipe,
            runtime=runtime,
            console=console,
            run_dir=Path(scratch) if scratch else open_run_dir(recipe, runtime, resume=resume is not None),
            model=model,
            tokenizer=tokenizer,
            optimizer=make_optimizer(model, recipe.optim, model.hidden_matrices()),
            plan=plan,
            dtype=dtype,
            source=ComparisonSource(data.train, collate, plan, runtime, recipe.run.seed),
            objective=objective,
            held_out=[],
            data_hash=data_hash,
            resumed=resumed,
            measure=measure if len(data.held_out) >= runtime.dp_size else None,
        )
        return training.execute()


def with_reference(reference: GPT | None, device: torch.device, dtype: torch.dtype) -> Collate:
    """Batches that hold the reference's log-probabilities beside tokens and targets; zeros where there is none."""

    def collate(comparisons: Sequence[Comparison]) -> Batch:
        batch = responses_alone(comparisons)
        ref_logprobs = torch.zeros(batch["tokens"].shape)
        if reference is not None:
            tokens, targets = batch["tokens"].to(device), batch["targets"].to(device)
            ref_logprobs = judge(reference, tokens, targets, temperature=1.0, rows=len(tokens), dtype=dtype).logprobs
        return dataclasses.replace(batch, tensors={**batch.tensors, "ref_logprobs": ref_logprobs})

    return collate

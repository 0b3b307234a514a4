"""`gpt rlhf-dpo`: a policy learns from preferences directly, held near the reference it started as."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from gptcli.config.schema import DPORecipe
from gptcli.contracts import Batch
from gptcli.generate import Engine
from gptcli.model import GPT
from gptcli.modeldir import load_model
from gptcli.rlhf.comparisons import Collate, ComparisonSource, batches, responses_alone
from gptcli.rlhf.preferences import Comparison
from gptcli.rlhf.reference import judge
from gptcli.stages.frozen import fingerprint, policy
from gptcli.stages.job import Job
from gptcli.stages.preferences import read_preferences
from gptcli.train.loop import evaluate_all
from gptcli.train.objectives.dpo import DPO


def run(job: Job[DPORecipe]) -> dict[str, Any]:
    recipe, runtime, block = job.recipe, job.runtime, job.recipe.dpo
    tokenizer = job.base.require_tokenizer()
    started = job.start(tokenizer, fingerprint(recipe), partial(policy, job, {}))
    model = started.model
    data = read_preferences(recipe, Engine(model, tokenizer), job.say)
    reference = None if block.reference_free else load_model(job.base, device=runtime.device).requires_grad_(False)
    collate = with_reference(reference, runtime.device, job.dtype)
    plan = started.plan(texts_per_row=data.most, examples=len(data.train))
    objective = DPO(block.beta, block.loss, block.label_smoothing, block.per_token)
    mine = data.held_out[runtime.dp_rank :: runtime.dp_size]
    held_out = batches(mine, collate, plan.micro_batch_size)
    baseline = data.length_baseline()

    def measure(step: int) -> dict[str, Any]:
        figures = evaluate_all(model, held_out, objective, runtime, dtype=job.dtype)
        return {**{f"val_{name}": value for name, value in figures.items()}, **baseline}

    return started.train(
        plan,
        ComparisonSource(data.train, collate, plan, runtime, recipe.run.seed),
        objective,
        measure=measure if len(data.held_out) >= runtime.dp_size else None,
    )


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

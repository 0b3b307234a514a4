"""`gpt rlhf-reward`: a scalar head on a checkpoint learns which of two answers people prefer."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcli.config.schema import RewardRecipe, SamplingParams
from gptcli.dist.runtime import Runtime
from gptcli.files import publish_text
from gptcli.generate import Engine
from gptcli.model import GPT
from gptcli.modeldir import load_model
from gptcli.randomness import derive
from gptcli.rlhf.calibration import histogram, judge_scores
from gptcli.rlhf.comparisons import ComparisonSource, whole_rows
from gptcli.rlhf.preferences import Comparison
from gptcli.rlhf.rewards import HEAD, Normalization, score_rows
from gptcli.rlhf.sequences import pass_order
from gptcli.stages.frozen import fingerprint, policy
from gptcli.stages.job import Job
from gptcli.stages.preferences import read_preferences
from gptcli.train.objectives.reward import BradleyTerry


def run(job: Job[RewardRecipe]) -> dict[str, Any]:
    recipe, runtime, config = job.recipe, job.runtime, job.base.config
    tokenizer = job.base.require_tokenizer()
    reference = Engine(load_model(job.base, device=runtime.device), tokenizer, dtype=job.dtype)
    learned_from = fingerprint(recipe)
    data = read_preferences(recipe, reference, job.say)
    head = {HEAD: 1 / math.sqrt(config.n_embd + 1)}
    started = job.start(tokenizer, learned_from, partial(policy, job, head))
    model = started.model
    if model.lm_head is not None:
        model.lm_head.requires_grad_(False)  # the words it would write are no part of the loss
    samples: list[list[int]] = []
    if recipe.reward.normalize:
        job.say(f"writing {recipe.reward.normalize_samples} samples, by whose scores all are normalised")
        samples = reference_samples(recipe, reference, data.train)
        if started.resumed is None and HEAD not in config.scalar_heads:
            fold(Normalization.of(score_rows(model, samples, dtype=job.dtype)), model)
    plan = started.plan(texts_per_row=data.most, examples=len(data.train))
    baseline = data.length_baseline()

    def measure(step: int) -> dict[str, Any]:
        scores = shared_scores(model, data.held_out, runtime, job.dtype)
        if runtime.is_main:
            text = json.dumps(histogram(scores, data.held_out), indent=2)
            publish_text(job.run_dir / "scores.json", text + "\n")
        return {**judge_scores(scores, data.held_out), **baseline}

    def beside(checkpoint: Path) -> None:
        if samples:
            Normalization.of(score_rows(model, samples, dtype=job.dtype)).save(checkpoint)

    return started.train(
        plan,
        ComparisonSource(data.train, whole_rows, plan, runtime, recipe.run.seed),
        BradleyTerry(recipe.reward.margins),
        measure=measure if data.held_out else None,
        beside=beside,
    )


def reference_samples(recipe: RewardRecipe, reference: Engine, comparisons: list[Comparison]) -> list[list[int]]:
    """Whole rows that the checkpoint itself writes after prompts of the data; the same in every process."""
    limit = reference.model.config.context_length
    order = pass_order(len(comparisons), recipe.run.seed, "normalize", range(recipe.reward.normalize_samples))
    new = min(recipe.sampling.max_new_tokens, max(1, limit // 2))
    params = SamplingParams(max_new_tokens=new, seed=derive(recipe.run.seed, "normalize"))
    rows = [comparisons[i].prompt[new - limit :] for i in order]
    for token in reference.tokens(rows.copy(), params, logprobs=False):
        place = int(token.key)  # type: ignore[call-overload]
        rows[place] = [*rows[place], token.id]
    return rows


def fold(normalization: Normalization, model: GPT) -> None:
    """Put it into the head, before training."""
    weight, bias = (model.get_parameter(f"scalar_heads.{HEAD}.{name}") for name in ("weight", "bias"))
    with torch.no_grad():
        weight.div_(normalization.std)
        bias.sub_(normalization.mean).div_(normalization.std)


def shared_scores(model: GPT, comparisons: list[Comparison], runtime: Runtime, dtype: torch.dtype) -> Tensor:
    """The scores (N,) of all responses in order, each process having done its share."""
    rows = [row for c in comparisons for row in c.rows]
    scores = torch.zeros(len(rows))
    mine = slice(runtime.dp_rank, None, runtime.dp_size)
    scores[mine] = score_rows(model, rows[mine], dtype=dtype)
    return runtime.all_sum(scores.to(runtime.device)).cpu()

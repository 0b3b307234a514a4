"""`gpt pretrain`: rows of text in, a language model out."""

from __future__ import annotations

from typing import Any

import numpy as np

from gptcli.config.plan import TrainPlan
from gptcli.config.schema import Recipe
from gptcli.data.batches import HeldOutRows, PretrainSource
from gptcli.data.prepare import TrainingData, checkpoint_tokenizer_matches, prepare
from gptcli.stages.job import Job
from gptcli.train.objectives import next_token


def run(job: Job[Recipe]) -> dict[str, Any]:
    data = open_data(job)
    started = job.start(data.tokenizer, data.hash)
    plan = started.plan()
    source = PretrainSource(data.rows(plan.seq_len, job.recipe.run.seed), plan, job.runtime.dp_rank)
    return started.train(plan, source, next_token, _held_out(data, job, plan))


def open_data(job: Job[Recipe]) -> TrainingData:
    """The tokens of the recipe's text; with init_from, in the checkpoint's vocabulary."""
    recipe, spec = job.recipe, job.recipe.tokenizer
    if recipe.init_from is not None and spec is None:
        spec = str(job.base.path)
    with job.runtime.main_first():
        data = prepare(recipe.data, spec, cache=job.scratch, say=job.say)
    if recipe.init_from is not None:
        checkpoint_tokenizer_matches(data, job.base.require_tokenizer(), recipe.init_from)
    return data


def _held_out(data: TrainingData, job: Job[Recipe], plan: TrainPlan) -> list[Any]:
    tokens, train, runtime = data.held_out(), job.recipe.train, job.runtime
    if train.eval_every == 0 or len(tokens) < 2:
        return []
    rows = np.asarray(tokens)
    micro = plan.micro_batch_size
    return list(HeldOutRows(rows, plan.seq_len, train.eval_rows, micro, runtime.dp_rank, runtime.dp_size))

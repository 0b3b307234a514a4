"""`gpt pretrain`: rows of text in, a language model out."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from gptcli.config.schema import Recipe
from gptcli.data.batches import HeldOutRows, PretrainSource
from gptcli.data.prepare import TrainingData, checkpoint_tokenizer_matches, prepare
from gptcli.dist.runtime import Runtime, pick_precision
from gptcli.modeldir import open_model_dir
from gptcli.stages.build import compile_model, open_run_dir, pick_plan, pinned, start_model
from gptcli.stages.console import RunConsole
from gptcli.stages.run import TrainingRun
from gptcli.train.checkpoint import find_checkpoint
from gptcli.train.objectives import next_token
from gptcli.train.optim import make_optimizer


def run(
    recipe: Recipe,
    runtime: Runtime,
    console: RunConsole,
    *,
    resume: Path | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train and return the summary. `resume` is a run directory whose latest checkpoint to go on from."""
    recipe = pinned(recipe)
    with tempfile.TemporaryDirectory(prefix="gpt-dry-run-") if dry_run else nullcontext() as scratch:
        data = open_data(recipe, runtime, console, cache=Path(scratch) if scratch else None)
        model, resumed = start_model(recipe, data.tokenizer, data.hash, runtime, console.say, resume=resume)
        dtype = pick_precision(recipe.train.precision, runtime.device)
        plan = pick_plan(recipe, model.config, runtime, console.say, dtype=dtype)
        source = PretrainSource(data.rows(plan.seq_len, recipe.run.seed), plan, runtime.dp_rank)
        held_out = _held_out(data, recipe, runtime, plan.seq_len, plan.micro_batch_size)
        compile_model(model, recipe, console.say)
        optimizer = make_optimizer(model, recipe.optim, model.hidden_matrices())
        run_dir = Path(scratch) if scratch else open_run_dir(recipe, runtime, resume=resume is not None)
        training = TrainingRun(
            recipe=recipe,
            runtime=runtime,
            console=console,
            run_dir=run_dir,
            model=model,
            tokenizer=data.tokenizer,
            optimizer=optimizer,
            plan=plan,
            dtype=dtype,
            source=source,
            objective=next_token,
            held_out=held_out,
            data_hash=data.hash,
            resumed=resumed,
        )
        return training.execute()


def open_data(recipe: Recipe, runtime: Runtime, console: RunConsole, *, cache: Path | None) -> TrainingData:
    """The tokens of the recipe's text; with init_from, in the checkpoint's vocabulary."""
    spec = recipe.tokenizer
    if recipe.init_from is not None and spec is None:
        spec = str(find_checkpoint(recipe.init_from))
    with runtime.main_first():
        data = prepare(recipe.data, spec, cache=cache, say=console.say)
    if recipe.init_from is not None:
        folder = open_model_dir(find_checkpoint(recipe.init_from))
        checkpoint_tokenizer_matches(data, folder.require_tokenizer(), recipe.init_from)
    return data


def _held_out(data: TrainingData, recipe: Recipe, runtime: Runtime, seq_len: int, micro: int) -> list[Any]:
    tokens = data.held_out()
    if recipe.train.eval_every == 0 or len(tokens) < 2:
        return []
    rows = HeldOutRows(np.asarray(tokens), seq_len, recipe.train.eval_rows, micro, runtime.dp_rank, runtime.dp_size)
    return list(rows)

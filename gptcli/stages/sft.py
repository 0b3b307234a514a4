"""`gpt sft`: conversations in, a model that answers out."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from gptcli.config.schema import Recipe, SFTRecipe
from gptcli.data.batches import RowSource, shared_evenly
from gptcli.data.chat_data import ChatData, chat_tokenizer, prepare_chat
from gptcli.data.chat_rows import chat_batch
from gptcli.dist.runtime import Runtime, pick_precision
from gptcli.modeldir import open_model_dir
from gptcli.stages.build import compile_model, open_run_dir, pick_plan, pinned, start_model
from gptcli.stages.console import RunConsole
from gptcli.stages.run import TrainingRun
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.chat_template import encode_chat
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
    tokenizer, data = open_chat(recipe, console)
    model, resumed = start_model(recipe, tokenizer, data.hash, runtime, console.say, resume=resume)
    dtype = pick_precision(recipe.train.precision, runtime.device)
    plan = pick_plan(recipe, model.config, runtime, console.say, dtype=dtype)
    held_out = data.held_out[: recipe.train.eval_rows] if recipe.train.eval_every else []
    compile_model(model, recipe, console.say)
    with tempfile.TemporaryDirectory(prefix="gpt-dry-run-") if dry_run else nullcontext() as scratch:
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
            source=RowSource(data.train, plan, chat_batch, runtime.dp_rank),
            objective=next_token,
            held_out=shared_evenly(held_out, [], chat_batch, plan.micro_batch_size, runtime.dp_rank, runtime.dp_size),
            data_hash=data.hash,
            sample_prompt=sample_prompt(recipe, tokenizer),
            resumed=resumed,
        )
        return training.execute()


def open_chat(recipe: Recipe, console: RunConsole) -> tuple[Tokenizer, ChatData]:
    """The tokenizer that conversations are written with, and the conversations."""
    assert isinstance(recipe, SFTRecipe)
    assert recipe.init_from is not None
    folder = open_model_dir(find_checkpoint(recipe.init_from))
    tokenizer = chat_tokenizer(folder.require_tokenizer(), recipe.sft)
    seq_len = recipe.train.seq_len or recipe.context_length or folder.config.context_length
    return tokenizer, prepare_chat(recipe.data, recipe.sft, tokenizer, seq_len, recipe.run.seed, console.say)


def sample_prompt(recipe: Recipe, tokenizer: Tokenizer) -> str | list[int]:
    """train.sample_prompt as a user's words, in the template."""
    assert isinstance(recipe, SFTRecipe)
    prompt = recipe.train.sample_prompt
    if recipe.sft.template == "none" or recipe.train.sample_every == 0:
        return prompt
    return encode_chat(tokenizer, [{"role": "user", "content": prompt}])

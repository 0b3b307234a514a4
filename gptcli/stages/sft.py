"""`gpt sft`: conversations in, a model that answers out."""

from __future__ import annotations

from typing import Any

from gptcli.config.schema import SFTRecipe
from gptcli.data.batches import RowSource, shared_evenly
from gptcli.data.chat_data import ChatData, chat_tokenizer, prepare_chat
from gptcli.data.chat_rows import chat_batch
from gptcli.stages.job import Job
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.chat_template import encode_chat
from gptcli.train.objectives import next_token


def run(job: Job[SFTRecipe]) -> dict[str, Any]:
    recipe, runtime = job.recipe, job.runtime
    tokenizer, data = open_chat(job)
    started = job.start(tokenizer, data.hash)
    plan = started.plan(examples=len(data.train.rows))
    held_out = data.held_out[: recipe.train.eval_rows] if recipe.train.eval_every else []
    return started.train(
        plan,
        RowSource(data.train, plan, chat_batch, runtime.dp_rank),
        next_token,
        shared_evenly(held_out, [], chat_batch, plan.micro_batch_size, runtime.dp_rank, runtime.dp_size),
        sample_prompt=sample_prompt(recipe, tokenizer),
    )


def open_chat(job: Job[SFTRecipe]) -> tuple[Tokenizer, ChatData]:
    """The tokenizer that conversations are written with, and the conversations."""
    recipe, base = job.recipe, job.base
    tokenizer = chat_tokenizer(base.require_tokenizer(), recipe.sft)
    seq_len = recipe.train.seq_len or recipe.context_length or base.config.context_length
    return tokenizer, prepare_chat(recipe.data, recipe.sft, tokenizer, seq_len, recipe.run.seed, job.say)


def sample_prompt(recipe: SFTRecipe, tokenizer: Tokenizer) -> str | list[int]:
    """train.sample_prompt as a user's words, in the template."""
    prompt = recipe.train.sample_prompt
    if recipe.sft.template == "none" or recipe.train.sample_every == 0:
        return prompt
    return encode_chat(tokenizer, [{"role": "user", "content": prompt}])

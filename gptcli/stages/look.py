"""What a run will train on, or what one step of it was trained on, without training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptcli.config.load import apply_overrides, build_recipe, load_recipe
from gptcli.config.plan import TrainPlan, make_plan
from gptcli.config.schema import Recipe, SFTRecipe
from gptcli.contracts import Batch
from gptcli.data.batches import Rows, RowSource, lm_batch
from gptcli.data.chat_rows import ChatRows, chat_batch
from gptcli.data.prepare import TrainingData
from gptcli.data.shards import open_tokens
from gptcli.data.view import View, views_of
from gptcli.dist.runtime import Runtime
from gptcli.errors import UserError
from gptcli.modeldir import read_config
from gptcli.stages.console import RunConsole
from gptcli.stages.job import Job
from gptcli.stages.pretrain import open_data
from gptcli.stages.sft import open_chat
from gptcli.tokenizer import Tokenizer
from gptcli.train.checkpoint import Training, find_checkpoint, load_training

SHARD_ROW = 256  # tokens of a row of a directory, which knows of none


@dataclass(frozen=True)
class Seen:
    """Rows in the order of the training, and how to read them."""

    rows: Rows
    collate: Callable[[Any], Batch]
    tokenizer: Tokenizer
    hash: str
    stats: dict[str, Any]

    def views(self, numbers: Sequence[int] | np.ndarray) -> Iterator[list[View]]:
        for number in numbers:
            yield from views_of(self.collate(self.rows.get(np.array([number]))), self.tokenizer)


def see(what: str, overrides: Sequence[str], console: RunConsole) -> Seen:
    """The rows of a tokenized directory, or of a recipe by name or path."""
    if (Path(what) / "meta.json").is_file():
        shards = open_tokens(what)
        return _text(TrainingData([shards], [1.0]), min(SHARD_ROW, len(shards.tokens("train")) - 1), seed=0)
    return see_recipe(load_recipe(what, overrides), console)


def see_conversations(file: str, checkpoint: Path, overrides: Sequence[str], console: RunConsole) -> Seen:
    """The rows that `gpt sft` would make of a file for this checkpoint."""
    tree: dict[str, Any] = {"init_from": str(checkpoint), "data": {"train": [file], "val_fraction": 0.0}}
    tree["train"] = {"max_steps": 1, "global_batch_size": 1}
    apply_overrides(tree, overrides)
    return see_recipe(build_recipe(tree, where=file, stage="sft"), console)


def see_recipe(recipe: Recipe, console: RunConsole) -> Seen:
    if isinstance(recipe, SFTRecipe):
        tokenizer, chat = open_chat(Job(recipe, Runtime(), console))
        return Seen(chat.train, chat_batch, tokenizer, chat.hash, chat_stats(chat.train))
    if recipe.stage != "pretrain":
        raise UserError(f"gpt data: knows the rows of pretrain and sft, not of {recipe.stage}")
    data = open_data(Job(recipe, Runtime(), console))
    if recipe.model is not None:
        context_length = recipe.model.context_length
    else:
        context_length = recipe.context_length or read_config(find_checkpoint(str(recipe.init_from))).context_length
    return _text(data, recipe.train.seq_len or context_length, recipe.run.seed)


def _text(data: TrainingData, seq_len: int, seed: int) -> Seen:
    counts: dict[str, Any] = {}
    for part in data.parts:
        for split, of_split in part.meta["splits"].items():
            for name, value in of_split.items():
                counts[f"{split}_{name}"] = counts.get(f"{split}_{name}", 0) + value
    counts["vocab_size"] = data.tokenizer.vocab_size
    return Seen(data.rows(seq_len, seed), lm_batch, data.tokenizer, data.hash, counts)


def chat_stats(rows: ChatRows) -> dict[str, Any]:
    examples = [example for row in rows.rows for example in row]
    lengths = sorted(map(len, examples))
    return {
        "conversations": len(examples),
        "answers": sum(len(example.answers) for example in examples),
        "tokens": sum(lengths),
        "trained_tokens": sum(int(example.trained.sum()) for example in examples),
        "median_tokens": lengths[len(lengths) // 2],
        "longest_tokens": lengths[-1],
        "rows": len(rows.rows),
    }


def trace_step(run: Path, step: int, console: RunConsole) -> Iterator[list[View]]:
    """The rows that step `step` (from 1) of a run was trained on. Raises UserError where its data has changed."""
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run}: not a run (no recipe.yaml)")
    recipe, checkpoint = load_recipe(str(run / "recipe.yaml")), find_checkpoint(run)
    training, seen = load_training(checkpoint), see_recipe(recipe, console)
    if training.facts["data_hash"] != seen.hash:
        raise UserError(f"{run}: the data has changed since; what its steps saw is gone")
    if step > training.state.step:
        raise UserError(f"--step {step}: {checkpoint} stands at step {training.state.step}")
    source = RowSource(seen.rows, _plan_of(recipe, checkpoint, training), seen.collate)
    for _ in range(step - 1):
        source.next_numbers()
    return seen.views(source.next_numbers())


def _plan_of(recipe: Recipe, checkpoint: Path, training: Training) -> TrainPlan:
    """The run's plan, as far as it decides which rows a step has. Whether it ran on a GPU, where steps may be larger,
    shows in the rows that it has seen."""
    context_length = read_config(checkpoint).context_length
    for on_cpu in (False, True):
        plan = make_plan(recipe, context_length=context_length, dp_size=1, micro_batch_size=1, on_cpu=on_cpu)
        seen = 0
        for _ in range(training.state.step):
            seen += plan.rows_at(seen * plan.seq_len)
        if seen == training.source["rows_seen"]:
            return plan
    raise UserError(f"{checkpoint}: saw {training.source['rows_seen']} rows, which its recipe does not account for")

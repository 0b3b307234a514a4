"""What the stages of RLHF start from, and what must still be the same when they are resumed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gptcli.config.schema import DataBlock, ModelConfig, Recipe, RewardBlock
from gptcli.data.sources import list_files
from gptcli.dist.runtime import Runtime
from gptcli.errors import UserError
from gptcli.model import GPT
from gptcli.model.extend import with_heads
from gptcli.modeldir import WEIGHTS
from gptcli.stages.build import Weights, build_model
from gptcli.tokenizer import Tokenizer
from gptcli.train.checkpoint import digest_of, find_checkpoint


def builder(
    recipe: Recipe, heads: Mapping[str, float], tokenizer: Tokenizer, runtime: Runtime, say: Callable[[str], None]
) -> Callable[[], GPT]:
    """Makes the recipe's checkpoint with these heads and without dropout: with it, probabilities would differ from one
    look to the next, and a ratio of them would compare noise."""

    def adapt(config: ModelConfig, weights: Weights) -> tuple[ModelConfig, Weights]:
        return with_heads(dataclasses.replace(config, dropout=0.0), weights, heads, recipe.run.seed)

    return partial(build_model, recipe, tokenizer, runtime, say, adapt)


def data_files(data: DataBlock) -> list[Path]:
    """The files of data.train or data.source."""
    if not (specs := data.train or data.source):
        raise UserError("data: nothing to train on; name .jsonl files in data.train")
    return [file for spec in specs for file in list_files(spec)]


def held_out_files(data: DataBlock) -> list[Path]:
    return [file for spec in data.val for file in list_files(spec)]


def fingerprint(recipe: Recipe) -> str:
    """Of the data, the reference's weights and whatever gives rewards: a resume is exact only if none has changed."""
    assert recipe.init_from is not None
    files = [*data_files(recipe.data), *held_out_files(recipe.data)]
    files.append(find_checkpoint(recipe.init_from) / WEIGHTS)
    for key in ("reward", "held_out_reward"):
        reward: Any = getattr(recipe, key, None)
        if isinstance(reward, RewardBlock) and reward.checkpoint is not None:
            files.append(find_checkpoint(reward.checkpoint) / WEIGHTS)
        if isinstance(reward, RewardBlock) and reward.function is not None and ":" in reward.function:
            files.append(Path(reward.function.rpartition(":")[0]))
    digest = hashlib.sha256()
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file")
        digest.update(digest_of(file).encode())
    return digest.hexdigest()[:16]

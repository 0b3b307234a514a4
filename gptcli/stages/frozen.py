"""What the stages of RLHF start from, and what must still be the same when they are resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptcli.config.schema import DataBlock, Recipe, RewardBlock
from gptcli.data.examples import KINDS
from gptcli.data.sources import HUB, list_files
from gptcli.errors import UserError
from gptcli.model import GPT
from gptcli.model.extend import with_heads
from gptcli.modeldir import weight_files
from gptcli.stages.build import first_weights, trainable
from gptcli.stages.job import Job
from gptcli.train.checkpoint import digest_of, find_checkpoint

STDIN = Path("-")


def policy(job: Job[Any], heads: Mapping[str, float]) -> GPT:
    """The model to begin with: the checkpoint with these scalar heads (see with_heads) and without dropout. With it,
    probabilities would differ from one look to the next, and a ratio of them would compare noise."""
    recipe, tokenizer = job.recipe, job.base.require_tokenizer()
    config, weights, _ = first_weights(recipe, tokenizer, job.runtime, job.say)
    config, weights = with_heads(dataclasses.replace(config, dropout=0.0), weights, heads, recipe.run.seed)
    return trainable(recipe, job.runtime, config, weights)


def data_files(data: DataBlock, kinds: tuple[str, ...] = KINDS) -> list[Path]:
    """The files of data.train or data.source, stdin among them; of folders those of `kinds`. A data set of the hub has
    none."""
    if not (specs := data.train or data.source):
        raise UserError("data: nothing to train on; name .jsonl files in data.train")
    return _files(specs, kinds)


def held_out_files(data: DataBlock, kinds: tuple[str, ...] = KINDS) -> list[Path]:
    return _files(data.val, kinds)


def _files(specs: Sequence[str], kinds: tuple[str, ...]) -> list[Path]:
    local = [spec for spec in specs if not spec.startswith(HUB)]
    return [file for spec in local for file in ([STDIN] if spec == "-" else list_files(spec, kinds))]


def fingerprint(recipe: Recipe, kinds: tuple[str, ...] = KINDS) -> str:
    """Of the data, the reference's weights and whatever gives rewards: a resume is exact only if none has changed."""
    assert recipe.init_from is not None
    files = [*data_files(recipe.data, kinds), *held_out_files(recipe.data, kinds)]
    files += weight_files(find_checkpoint(recipe.init_from))
    for key in ("reward", "held_out_reward"):
        reward: Any = getattr(recipe, key, None)
        if isinstance(reward, RewardBlock) and reward.checkpoint:
            files += weight_files(find_checkpoint(reward.checkpoint))
        if isinstance(reward, RewardBlock) and reward.function and ":" in reward.function:
            files.append(Path(reward.function.rpartition(":")[0]))
    digest = hashlib.sha256("\n".join(s for s in recipe.data.train + recipe.data.source if s.startswith(HUB)).encode())
    for file in files:
        if file == STDIN:
            digest.update(hashlib.sha256(read_ahead()).digest())
            continue
        if not file.is_file():
            raise UserError(f"{file}: no such file")
        digest.update(digest_of(file).encode())
    return digest.hexdigest()[:16]


def read_ahead() -> bytes:
    """All of stdin, which whoever reads it next finds there again."""
    data = sys.stdin.buffer.read()
    sys.stdin = io.TextIOWrapper(io.BytesIO(data), "utf-8")
    return data

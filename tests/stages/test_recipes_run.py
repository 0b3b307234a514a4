"""Every shipped recipe, shrunk to a toy's size but otherwise as it is, trains two steps."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from gptcli.config.load import load_recipe
from gptcli.config.shipped import shipped_recipes
from gptcli.dist.runtime import Runtime
from gptcli.stages import pretrain
from gptcli.stages.console import RunConsole
from tests.rlhf.known_answer import VARIABLE, World

RECIPES = {path.stem: load_recipe(path.stem).stage for path in shipped_recipes()}
NAMES = [name for name, stage in RECIPES.items() if stage == "pretrain"]
RLHF = [name for name, stage in RECIPES.items() if stage.startswith("rlhf-")]


@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains_two_steps(name: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text of no importance, 0123456789\n" * 200)
    shrunk = {
        "run.dir": tmp_path / "runs",
        "data.source": f"[{text}]",
        "tokenizer": "bytes",
        "model.n_layer": 2,
        "model.n_head": 2,
        "model.n_embd": 16,
        "model.context_length": 32,
        "model.vocab_size": 257,
        "train.global_batch_size": 16,
        "train.max_tokens": 2 * 16 * 32,
        "train.max_steps": "null",
        "train.eval_every": 1,
    }
    recipe = load_recipe(name, [f"{k}={v}" for k, v in shrunk.items()], stage="pretrain")
    summary = pretrain.run(recipe, Runtime(), RunConsole(quiet=True))
    assert summary["step"] == 2
    assert summary["tokens"] == 2 * 16 * 32
    assert 4 < summary["val_loss"] < 7


@pytest.mark.parametrize("name", RLHF)
def test_recipe_of_rlhf_trains_two_steps(name: str, tmp_path: Path) -> None:
    world = World(tmp_path, VARIABLE)
    rows = [{"prompt": "a", "chosen": "ab" * n, "rejected": "c" * n} for n in (1, 2)] * 8
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    learns_from_pairs = name in ("rlhf-reward", "rlhf-dpo")
    shrunk = {
        "run.dir": tmp_path / "runs",
        "init_from": tmp_path / "reference",
        "data.train": f"[{tmp_path / ('pairs.jsonl' if learns_from_pairs else 'prompts.jsonl')}]",
        "sampling.max_new_tokens": 4,
        "train.max_steps": 2,
        "train.global_batch_size": 16,
    }
    block = name.removeprefix("rlhf-")
    if not learns_from_pairs:
        shrunk |= {"reward.checkpoint": "null", "reward.function": f"{world.folder / 'reward.py'}:score"}
        shrunk |= {f"{block}.rollout_batch_size": 32}
    else:
        shrunk.pop("sampling.max_new_tokens")
    recipe = load_recipe(name, [f"{k}={v}" for k, v in shrunk.items()], stage=name)
    stage = importlib.import_module(f"gptcli.stages.{block}")
    summary = stage.run(recipe, Runtime(), RunConsole(quiet=True))
    assert summary["step"] == 2
    assert summary["train_loss"] is not None

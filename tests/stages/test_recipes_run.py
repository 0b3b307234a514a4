"""Every shipped recipe, shrunk to a toy's size but otherwise as it is, trains two steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptcli.config.load import load_recipe
from gptcli.config.shipped import shipped_recipes
from gptcli.dist.runtime import Runtime
from gptcli.stages.console import RunConsole
from gptcli.stages.job import run_stage
from tests.rlhf.known_answer import VARIABLE, World

RECIPES = {path.stem: load_recipe(path.stem).stage for path in shipped_recipes()}
NAMES = [name for name, stage in RECIPES.items() if not stage.startswith("rlhf-")]
RLHF = [name for name, stage in RECIPES.items() if stage.startswith("rlhf-")]
ROWS, SEQ_LEN = 16, 32
MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "context_length": SEQ_LEN, "vocab_size": 257}


def train(name: str, folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    shrunk = {"run.dir": folder / "runs", "train.global_batch_size": ROWS, "train.eval_every": 1, **changes}
    recipe = load_recipe(name, [f"{k}={v}" for k, v in shrunk.items()])
    return run_stage(recipe, Runtime(), RunConsole(quiet=True))


def labelled_example(number: int) -> dict[str, Any]:
    """One that every task of gpt finetune can read."""
    columns = ("text", "premise", "hypothesis", "text_a", "text_b", "context", "question")
    return {**{name: f"{name} {number}" for name in columns}, "choices": ["a", "b"], "label": number % 2}


@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains_two_steps(name: str, tmp_path: Path) -> None:
    text, chat, labelled = (tmp_path / name for name in ("text.txt", "chat.jsonl", "labelled.jsonl"))
    text.write_text("some text of no importance, 0123456789\n" * 200)
    chat.write_text("".join(json.dumps({"prompt": f"{i}?", "response": f"{i}!"}) + "\n" for i in range(200)))
    labelled.write_text("".join(json.dumps(labelled_example(i)) + "\n" for i in range(200)))
    from_text = {"data.source": f"[{text}]", "train.max_tokens": 2 * ROWS * SEQ_LEN, "train.max_steps": "null"}
    new = {"tokenizer": "bytes", **{f"model.{k}": v for k, v in MODEL.items()}}
    recipe = load_recipe(name)
    if recipe.init_from is None:
        summary = train(name, tmp_path, {**from_text, **new})
        assert summary["tokens"] == 2 * ROWS * SEQ_LEN
        assert 4 < summary["val_loss"] < 7
    else:
        base = train("quickstart", tmp_path, {**from_text, **new, "run.name": "base"})["checkpoint"]
        mixture = f"[{{source: [{text}], weight: 0.7}}, {{source: [{chat}], weight: 0.3}}]"
        data = {
            "pretrain": {"data.mixture": mixture, "data.text_key": "prompt"},
            "sft": {"data.train": f"[{chat}]"},
            "finetune": {"data.train": f"[{labelled}]", "train.epochs": "null"},
        }[recipe.stage]
        summary = train(name, tmp_path, {**data, "init_from": base, "train.max_steps": 2})
        assert 0 < summary["val_loss"] < 8
    assert summary["step"] == 2


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
    summary = run_stage(recipe, Runtime(), RunConsole(quiet=True))
    assert summary["step"] == 2
    assert summary["train_loss"] is not None

"""Every shipped recipe, shrunk to a toy's size but otherwise as it is, trains two steps."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from gptcli.config.load import load_recipe
from gptcli.config.shipped import shipped_recipes
from gptcli.dist.runtime import Runtime
from gptcli.stages.console import RunConsole

NAMES = [path.stem for path in shipped_recipes()]
ROWS, SEQ_LEN = 16, 32
MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "context_length": SEQ_LEN, "vocab_size": 257}


def train(name: str, folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    shrunk = {"run.dir": folder / "runs", "train.global_batch_size": ROWS, "train.eval_every": 1, **changes}
    recipe = load_recipe(name, [f"{k}={v}" for k, v in shrunk.items()])
    stage = importlib.import_module("gptcli.stages." + recipe.stage.removeprefix("rlhf-"))
    return stage.run(recipe, Runtime(), RunConsole(quiet=True))


@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains_two_steps(name: str, tmp_path: Path) -> None:
    text, chat = tmp_path / "text.txt", tmp_path / "chat.jsonl"
    text.write_text("some text of no importance, 0123456789\n" * 200)
    chat.write_text("".join(json.dumps({"prompt": f"{i}?", "response": f"{i}!"}) + "\n" for i in range(200)))
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
        data = {"data.train": f"[{chat}]"} if recipe.stage == "sft" else {"data.mixture": mixture}
        data |= {"data.text_key": "prompt"} if recipe.stage == "pretrain" else {}
        summary = train(name, tmp_path, {**data, "init_from": base, "train.max_steps": 2})
        assert 0 < summary["val_loss"] < 8
    assert summary["step"] == 2

"""Every shipped pretraining recipe, shrunk to a toy's size but otherwise as it is, trains two steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptcli.config.load import load_recipe
from gptcli.config.shipped import shipped_recipes
from gptcli.dist.runtime import Runtime
from gptcli.stages import pretrain
from gptcli.stages.console import RunConsole

NAMES = [path.stem for path in shipped_recipes()]


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

"""gpt import and gpt export on the real command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import gpt
from tests.exchange import hugging_face

pytest.importorskip("transformers")


def test_in_out_and_generate(tmp_path: Path) -> None:
    hugging_face.save("gpt2", tmp_path / "hf")
    row = json.loads(gpt("import", tmp_path / "hf", "--json", cwd=tmp_path).out)
    assert row["path"] == "runs/hf"
    assert row["max_logit_difference"] <= row["tolerance"]
    # the newest model under ./runs is the one just imported
    text = gpt("generate", "line", "-n", "5", cwd=tmp_path)
    assert text.code == 0
    assert "using runs/hf" in text.err
    done = gpt("export", "runs/hf", "-o", "out", cwd=tmp_path)
    assert done.code == 0
    assert "largest difference of logits" in done.out
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_complaints_are_one_line_and_exit_2(tmp_path: Path) -> None:
    hugging_face.save("gpt2", tmp_path / "hf")
    assert gpt("import", "hf", "-o", "ours", "-q", "--no-check", cwd=tmp_path).code == 0
    for arguments, words in (
        (["import", "nowhere"], "no such file or directory"),
        (["import", "ours"], "is a gptcli checkpoint already"),
        (["import", "hf", "-o", "ours"], "exists; choose another -o"),
        (["export", "ours"], "needs -o"),
        (["export", "ours", "-o", "x", "--format", "onnx"], "expected hf or gguf"),
        (["export", "ours", "-o", "x", "--dtype", "int8"], "expected fp32, fp16, bf16"),
        (["export", "nowhere", "-o", "x"], "no such checkpoint"),
    ):
        done = gpt(*arguments, cwd=tmp_path)
        assert done.code == 2, arguments
        assert words in done.err
        assert done.err.count("\n") == 1

"""GGUF: read back by the gguf package, and the same text from llama.cpp."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gptcli
from gptcli.errors import UserError
from gptcli.exchange import gguf as ours
from gptcli.exchange.transfer import export_gguf
from gptcli.modeldir import open_model_dir, read_weights
from gptcli.tokenizer.build import char_tokenizer
from tests.exchange import hugging_face
from tests.exchange.test_transfer import make_dir

gguf = pytest.importorskip("gguf")

LLAMA = {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "n_kv_head": 2}
SHAPES = {
    "gpt2": {},
    "gpt2-untied": {"tie_embeddings": False, "bias": False},
    "llama": LLAMA,
    "llama-untied-stretched": {
        **LLAMA,
        "tie_embeddings": False,
        "rope_scaling": {"kind": "llama3", "factor": 4.0, "original_context_length": 16},
    },
}


def shape_of(name: str) -> dict[str, object]:
    from gptcli.config.schema import RopeScaling

    shape = dict(SHAPES[name])
    if "rope_scaling" in shape:
        shape["rope_scaling"] = RopeScaling(**shape["rope_scaling"])  # type: ignore[arg-type]
    return shape


@pytest.mark.parametrize("name", SHAPES)
def test_tensors_and_metadata_are_read_back(name: str, tmp_path: Path) -> None:
    folder = make_dir(tmp_path / "ours", **shape_of(name))
    done = export_gguf(folder, tmp_path / "m.gguf", dtype=None)
    assert done.proof is not None
    assert done.proof.largest_difference == 0
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    arch = "llama" if "llama" in name else "gpt2"
    field = {key: f.contents() for key, f in reader.fields.items()}
    assert field["general.architecture"] == arch
    assert field[f"{arch}.block_count"] == 2
    assert field[f"{arch}.context_length"] == 64
    assert field[f"{arch}.attention.head_count_kv"] == (2 if arch == "llama" else 4)
    tokenizer = hugging_face.tokenizer()
    assert field["tokenizer.ggml.tokens"] == [tokenizer.backend.id_to_token(i) for i in range(320)]
    assert field["tokenizer.ggml.eos_token_id"] == 319
    assert field["tokenizer.ggml.token_type"][319] == gguf.TokenType.CONTROL
    tree = json.loads(tokenizer.backend.to_str())
    assert field["tokenizer.ggml.merges"] == [" ".join(m) for m in tree["model"]["merges"]]
    weights = read_weights(folder, open_model_dir(folder).config)
    tensors = {t.name: t for t in reader.tensors}
    assert np.array_equal(tensors["token_embd.weight"].data, weights["wte.weight"][:320].numpy())
    assert np.array_equal(tensors["blk.1.ffn_down.weight"].data, weights["h.1.mlp.c_proj.weight"].numpy())
    assert ("output.weight" in tensors) == ("untied" in name)
    assert ("rope_freqs.weight" in tensors) == ("stretched" in name)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision(dtype: str, tmp_path: Path) -> None:
    export_gguf(make_dir(tmp_path / "ours"), tmp_path / "m.gguf", dtype=dtype)
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if len(t.shape) == 2}
    assert kinds == {"F16" if dtype == "fp16" else "BF16"}


def test_a_tokenizer_that_llama_cpp_lacks_is_left_out_with_a_note(tmp_path: Path) -> None:
    folder = make_dir(tmp_path / "ours")
    char_tokenizer(["abc"]).save(folder)
    done = export_gguf(folder, tmp_path / "m.gguf", dtype=None)
    assert "no tokenizer" in done.notes[0]


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"norm_position": "post"}, r"norm_position: post \(there: pre\)"),
        ({"activation": "relu"}, "uses GELU"),
        ({"attention_pattern": "alternating", "band_width": 4}, "attention_pattern: alternating"),
    ],
)
def test_shapes_that_llama_cpp_lacks(shape: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        export_gguf(make_dir(tmp_path / "ours", **shape), tmp_path / "m.gguf", dtype=None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours"]


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'gptcli\[gguf\]'"):
        export_gguf(make_dir(tmp_path / "ours"), tmp_path / "m.gguf", dtype=None)


LLAMA_CPP = """
import json, sys, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.warmup, p.cpuparams.n_threads = sys.argv[1], 128, 1, False, 1
request = {"prompt": sys.argv[2], "n_predict": 50, "temperature": 0, "top_k": 1, "ignore_eos": True}
print(json.dumps(xllamacpp.Server(p).handle_completions(request)["choices"][0]["text"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SHAPES, "stories260K"])
def test_llama_cpp_writes_the_same_text(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp's Python package is not installed")
    if name == "stories260K":
        from gptcli.exchange.transfer import import_model

        source = request.getfixturevalue("shared_data") / "weights/stories260K/stories260K.bin"
        folder, prompt = import_model(str(source), tmp_path / "ours").path, "Once upon a time"
    else:
        folder, prompt = make_dir(tmp_path / "ours", **shape_of(name), context_length=128), "line 7: the"
    export_gguf(folder, tmp_path / "m.gguf", dtype=None)
    expected = gptcli.load(folder).generate(prompt, temperature=0.0, max_new_tokens=50, ignore_eos=True)
    command = [sys.executable, "-c", LLAMA_CPP, str(tmp_path / "m.gguf"), prompt]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_the_exact_gelu_is_noted(tmp_path: Path) -> None:
    done = export_gguf(make_dir(tmp_path / "ours", activation="gelu"), tmp_path / "m.gguf", dtype=None)
    assert "tanh form" in done.notes[0]


def test_reading_back_undoes_the_rotary_order(tmp_path: Path) -> None:
    folder = make_dir(tmp_path / "ours", **LLAMA)
    export_gguf(folder, tmp_path / "m.gguf", dtype=None)
    config = open_model_dir(folder).config
    plain, weights = ours.prepare(config, read_weights(folder, config), "x")
    back = ours.read_weights(tmp_path / "m.gguf", plain)
    assert all(torch.equal(back[name], weights[name]) for name in weights)

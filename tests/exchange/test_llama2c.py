"""llama2.c's files: the real stories260K, and files of both versions made here."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import gptcli
from gptcli.config.schema import ModelConfig
from gptcli.errors import UserError
from gptcli.exchange import llama2c
from gptcli.exchange.transfer import import_model
from gptcli.model import GPT
from gptcli.modeldir import read_weights

SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 16, "n_inner": 24, "context_length": 8, "vocab_size": 30}
LLAMA = {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "vocab_pad_multiple": 1}


def test_stories260k_writes_its_published_text(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "weights/stories260K"
    done = import_model(str(folder / "stories260K.bin"), tmp_path / "stories")
    assert done.params == 260_032
    model = gptcli.load(tmp_path / "stories")
    expected = (folder / "expected_greedy_200steps.txt").read_bytes()
    assert model.generate("", temperature=0.0, max_new_tokens=200).encode() == expected
    # the prompt's own tokens make no difference to what follows, nor does the space before the first word
    assert model.generate("Once upon a time", temperature=0.0, max_new_tokens=30).startswith(
        ", there was a little girl"
    )


def make(tie: bool, kv_heads: int) -> tuple[ModelConfig, GPT]:
    config = ModelConfig(**SHAPE, **LLAMA, tie_embeddings=tie, n_kv_head=kv_heads)  # type: ignore[arg-type]
    model = GPT(config)
    model.init_weights(3)
    return config, model.eval()


def write(file: Path, config: ModelConfig, weights: dict[str, torch.Tensor], version: int) -> None:
    """A .bin as llama2.c's export.py lays it out."""
    D, tie = config.head_dim, config.tie_embeddings
    vocab = config.vocab_size if tie or version else -config.vocab_size
    numbers = (16, 24, 2, 4, config.kv_heads, vocab, 8)
    header = struct.pack("<7i", *numbers)
    if version:
        header = (struct.pack("<Ii", llama2c.MAGIC, 1) + header + struct.pack("<B", tie)).ljust(256, b"\0")
    q, kv = 16, config.kv_heads * D
    split = {i: weights[f"h.{i}.attn.c_attn.weight"].split([q, kv, kv]) for i in range(2)}
    gates = {i: weights[f"h.{i}.mlp.c_fc.weight"].chunk(2) for i in range(2)}
    norms = [[weights[f"h.{i}.{ln}.weight"] for i in range(2)] for ln in ("ln_1", "ln_2")]
    attention = [
        [llama2c.pairs_from_halves(split[i][0], D) for i in range(2)],
        [llama2c.pairs_from_halves(split[i][1], D) for i in range(2)],
        [split[i][2] for i in range(2)],
        [weights[f"h.{i}.attn.c_proj.weight"] for i in range(2)],
    ]
    down = [weights[f"h.{i}.mlp.c_proj.weight"] for i in range(2)]
    mlp = [[gates[i][0] for i in range(2)], down, [gates[i][1] for i in range(2)]]
    wte, ln_f = [weights["wte.weight"]], [weights["ln_f.weight"]]
    if version:
        order = [*norms, ln_f, wte, *attention, *mlp]
    else:
        order = [wte, norms[0], *attention, norms[1], *mlp, ln_f, [torch.zeros(2, 8, D // 2)]]
    if not tie:
        order.append([weights["lm_head.weight"]])
    body = np.concatenate([t.detach().numpy().ravel() for group in order for t in group])
    file.write_bytes(header + body.astype("<f4").tobytes())


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_both_versions(version: int, tie: bool, kv_heads: int, tmp_path: Path) -> None:
    config, model = make(tie, kv_heads)
    write(tmp_path / "m.bin", config, dict(model.named_parameters()), version)
    import_model(str(tmp_path / "m.bin"), tmp_path / "ours")
    back = gptcli.load(tmp_path / "ours")
    x = torch.arange(8)[None]
    assert torch.equal(back.forward(x).logits, model(x).logits)
    assert back.config.tie_embeddings == tie
    assert read_weights(tmp_path / "ours", back.config).keys() == dict(model.named_parameters()).keys()


def test_pairs_and_halves_are_inverses() -> None:
    weight = torch.arange(8 * 3.0).view(8, 3)
    assert torch.equal(llama2c.halves_from_pairs(llama2c.pairs_from_halves(weight, 4), 4), weight)
    assert llama2c.pairs_from_halves(weight, 4)[:4, 0].tolist() == [0, 6, 3, 9]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda b: b[:20], "too short"),
        (lambda b: b[:-40], "cut short"),
        (lambda b: b"\xff" * 28 + b[28:], r"not a llama2\.c model"),
        (lambda b: struct.pack("<Ii", llama2c.MAGIC, 2) + b[8:], "version 2 .quantized. is not read"),
        (lambda b: b"", "too short"),
    ],
)
def test_damaged_files(damage, words: str, tmp_path: Path) -> None:
    config, model = make(False, 4)
    write(tmp_path / "m.bin", config, dict(model.named_parameters()), 0)
    (tmp_path / "m.bin").write_bytes(damage((tmp_path / "m.bin").read_bytes()))
    with pytest.raises(UserError, match=words):
        import_model(str(tmp_path / "m.bin"), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def write_tokenizer(file: Path, pieces: list[tuple[float, bytes]]) -> None:
    rows = b"".join(struct.pack("<fi", score, len(text)) + text for score, text in pieces)
    file.write_bytes(struct.pack("<i", 8) + rows)


SPECIAL = [(0.0, b"<unk>"), (0.0, b"\n<s>\n"), (0.0, b"\n</s>\n")]
BYTES = [(0.0, b"<0x%02X>" % i) for i in range(256)]


def test_tokenizer_merges_by_score_and_falls_back_to_bytes(tmp_path: Path) -> None:
    letters = [(-9.0, c) for c in (b" ", b"a", b"b", b"c")]
    merges = [(-1.0, b"bc"), (-2.0, b"ab"), (-3.0, b" a"), (-4.0, b"abc")]
    write_tokenizer(tmp_path / "t.bin", SPECIAL + BYTES + letters + merges)
    tokenizer = llama2c.read_tokenizer(tmp_path / "t.bin")
    pieces = [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("abc")]
    assert pieces == ["▁a", "bc"]  # bc scores best, then " a"
    assert tokenizer.encode("ü") == [259, 3 + 0xC3, 3 + 0xBC]
    assert tokenizer.adds_bos
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    for text in ("abc cab", "a  ü b", "你好"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_tokenizer_that_is_none(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "t.bin", [(0.0, b"a")])
    with pytest.raises(UserError, match=r"not a llama2\.c tokenizer"):
        llama2c.read_tokenizer(tmp_path / "t.bin")
    (tmp_path / "t.bin").write_bytes(b"\0\0\0\0\1\1")
    with pytest.raises(UserError, match=r"not a llama2\.c tokenizer"):
        llama2c.read_tokenizer(tmp_path / "t.bin")

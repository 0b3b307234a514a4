"""nanoGPT's ckpt.pt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gptcli
from gptcli.config.schema import ModelConfig
from gptcli.errors import UserError
from gptcli.exchange.transfer import import_model
from gptcli.model import GPT
from tests.exchange import hugging_face

ARGUMENTS = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 12,
    "vocab_size": 320,
    "bias": False,
    "dropout": 0.1,
}


def write(file: Path, *, compiled: bool = False, **changes: object) -> GPT:
    """A checkpoint as nanoGPT's train.py saves it: tied head twice, torch.compile's prefix, an optimizer beside."""
    model = GPT(
        ModelConfig(
            n_layer=2, n_head=2, n_embd=16, context_length=12, vocab_size=320, bias=False, activation="gelu"
        )
    ).eval()  # fmt: skip
    model.init_weights(0)
    prefix = "_orig_mod.transformer." if compiled else "transformer."
    state = {prefix + name: p.detach() for name, p in model.named_parameters()}
    state[prefix.replace("transformer.", "lm_head.weight")] = model.wte.weight.detach()
    state[prefix + "h.0.attn.bias"] = torch.ones(1, 1, 12, 12)
    tree = {"model": state, "model_args": {**ARGUMENTS, **changes}, "iter_num": 5, "best_val_loss": torch.tensor(2.0)}
    torch.save({**tree, "optimizer": {"state": {}}, "config": {"dataset": "x"}}, file)
    return model


@pytest.mark.parametrize("compiled", [False, True])
def test_import(compiled: bool, tmp_path: Path) -> None:
    model = write(tmp_path / "ckpt.pt", compiled=compiled)
    hugging_face.tokenizer().save(tmp_path)
    import_model(str(tmp_path), tmp_path / "ours", tokenizer=str(tmp_path / "tokenizer.json"))
    ours = gptcli.load(tmp_path / "ours")
    x = torch.arange(12)[None]
    torch.testing.assert_close(ours.forward(x).logits, model(x).logits)
    assert ours.config.activation == "gelu"  # nanoGPT's is the exact form
    assert isinstance(ours.generate("line", max_new_tokens=4), str)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "a.pt", n_layer=3)
    torch.save({"model": {}}, tmp_path / "b.pt")
    torch.save([1, 2], tmp_path / "c.pt")
    (tmp_path / "d.pt").write_bytes(b"nothing")
    expected = {"a": r"no tensor 'h\.2", "b": "not a nanoGPT checkpoint", "c": "holds a list", "d": "refused"}
    for name, words in expected.items():
        with pytest.raises(UserError, match=words) as caught:
            import_model(str(tmp_path / f"{name}.pt"), tmp_path / "ours")
        assert "\n" not in str(caught.value)

"""Longer contexts and new tokens: what is stated is what happens."""

from __future__ import annotations

import pytest
import torch

from gptcli.config.schema import ModelConfig, RopeScaling
from gptcli.errors import UserError
from gptcli.model import GPT
from gptcli.model.extend import add_token_rows, extend_context
from gptcli.modeldir import model_of


def make(position: str, **changes: object) -> GPT:
    config = ModelConfig(
        n_layer=2,
        n_head=2,
        n_embd=16,
        context_length=8,
        vocab_size=20,
        position=position,
        **changes,
    )  # type: ignore[arg-type]
    model = GPT(config)
    model.init_weights(0)
    return model.eval()


def stretch(model: GPT, length: int) -> tuple[GPT, str]:
    config, weights, how = extend_context(model.config, dict(model.named_parameters()), length)
    return model_of(config, weights), how


@pytest.mark.parametrize("position", ["learned", "alibi", "sinusoidal", "none"])
def test_short_texts_compute_as_before(position: str) -> None:
    model, x = make(position), torch.arange(8)[None]
    longer, _ = stretch(model, 20)
    assert longer.config.context_length == 20
    assert torch.equal(longer(x).logits, model(x).logits)
    assert longer(torch.arange(20)[None]).logits.shape == (1, 20, 20)


def test_learned_positions_repeat() -> None:
    model = make("learned")
    longer, how = stretch(model, 20)
    assert "repeated" in how
    assert torch.equal(longer.wpe.weight[8:16], model.wpe.weight)
    assert torch.equal(longer.wpe.weight[16:], model.wpe.weight[:4])


def test_rotary_positions_are_interpolated() -> None:
    model = make("rope")
    longer, how = stretch(model, 16)
    assert "divided by 2" in how
    x, places = torch.arange(8)[None], torch.arange(0, 16, 2)[None]
    torch.testing.assert_close(longer(x, position_ids=places).logits, model(x).logits)
    again, _ = stretch(longer, 32)
    assert again.config.rope_scaling == RopeScaling(factor=4.0)


def test_refusals() -> None:
    with pytest.raises(UserError, match="less than the checkpoint's 8"):
        stretch(make("learned"), 4)
    with pytest.raises(UserError, match="llama3 cannot be stretched further"):
        stretch(make("rope", rope_scaling=RopeScaling(kind="llama3", factor=2.0)), 16)


def test_a_recipe_stretches_and_otherwise_refuses(tiny) -> None:
    tiny.train()
    base = ["model=null", f"init_from={tiny.run_dir}", "tokenizer=null", "run.name=longer", "train.max_steps=2"]
    with pytest.raises(UserError, match=r"train\.seq_len: 24 is more than the 16 .* context_length=24 stretches it"):
        tiny.train(*base, "train.seq_len=24")
    tiny.train(*base, "context_length=24")
    assert tiny.weights("longer")["wpe.weight"].shape[0] == 24


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_fresh_rows_are_as_large_as_a_norm_after_them_asks(norm_position: str) -> None:
    model, known = make("rope", norm_position=norm_position), 20
    weights = {"wte.weight": torch.randn_like(model.wte.weight) * 0.5}
    larger, grown = add_token_rows(model.config, weights, range(known, known + 100), seed=1)
    assert larger.vocab_size == known + 100
    assert torch.equal(grown["wte.weight"][:known], weights["wte.weight"][:known])
    expected = 0.02 if norm_position == "post" else weights["wte.weight"][:known].std().item()
    assert grown["wte.weight"][known : known + 100].std().item() == pytest.approx(expected, rel=0.1)

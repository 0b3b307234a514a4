"""Attention weights and residuals are those of the real forward, for every shape of model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptcli.inspect.capture import attention_weights, residual_stream
from gptcli.model import GPT
from gptcli.model.positions import alibi_slopes
from tests.exchange import hugging_face
from tests.model.test_gpt import SHAPES, make, tokens

IDS = tokens(1, 20)[0].tolist()


def inputs_and_outputs(model: GPT, ids: list[int]) -> list[tuple[Tensor, Tensor]]:
    """What every attention module of one forward was given, and gave."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.append((inputs[0], output))

    hooks = [block.attn.register_forward_hook(keep) for block in model.h]
    model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", SHAPES)
def test_weights_times_values_give_the_modules_own_output(name: str) -> None:
    model = make(name)
    weights = attention_weights(model, IDS)
    for block, of_layer, (x, expected) in zip(model.h, weights, inputs_and_outputs(model, IDS), strict=True):
        attn = block.attn
        values = attn.c_attn(x)[..., -attn.kv_heads * attn.head_dim :].unflatten(-1, (attn.kv_heads, -1))
        values = values.repeat_interleave(attn.n_head // attn.kv_heads, dim=2)[0]  # (T, H, D)
        mixed = torch.einsum("hqk,khd->qhd", of_layer, values).flatten(1)
        torch.testing.assert_close(attn.c_proj(mixed), expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("length", [1, 20])
def test_rows_sum_to_one_and_see_no_later_token(name: str, length: int) -> None:
    model = make(name)
    weights = attention_weights(model, IDS[:length])
    assert weights.shape == (3, 2, length, length)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, length))
    assert not weights.triu(1).any()
    for layer, of_layer in enumerate(weights):
        if model.config.is_banded(layer):
            assert not of_layer.tril(-model.config.band_width).any()
        elif length > 1:
            assert of_layer[:, -1, 0].all()


def test_weights_by_hand() -> None:
    model = make("gpt2", n_layer=1)
    (x, _), *_ = inputs_and_outputs(model, IDS)
    q, k, _ = model.h[0].attn.c_attn(x[0]).split(16, dim=-1)
    for head in range(2):
        mine = slice(8 * head, 8 * head + 8)
        scores = q[:, mine] @ k[:, mine].T / math.sqrt(8)
        expected = scores.masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf).softmax(-1)
        torch.testing.assert_close(attention_weights(model, IDS)[0, head], expected, atol=1e-6, rtol=1e-5)


def test_alibi_alone_falls_with_distance() -> None:
    model = make("alibi", n_layer=1)
    with torch.no_grad():
        model.h[0].attn.c_attn.weight.zero_()
        model.h[0].attn.c_attn.bias.zero_()
    last = attention_weights(model, IDS)[0, :, -1]
    distance = torch.arange(19, -1, -1.0)
    expected = (-alibi_slopes(2)[:, None] * distance).softmax(-1)
    torch.testing.assert_close(last, expected)


@pytest.mark.parametrize("name", SHAPES)
def test_the_stream_is_what_goes_from_block_to_block(name: str) -> None:
    model = make(name)
    stream, logits = residual_stream(model, IDS)
    assert stream.shape == (4, 20, 16)
    torch.testing.assert_close(logits, model(torch.tensor([IDS])).logits[0])
    # a block adds what its parts give, and post-norm normalises what it hands on
    first = inputs_and_outputs(model, IDS)[0][0]
    torch.testing.assert_close(first[0], stream[0] if model.h[0].post else model.h[0].ln_1(stream[0]))


def test_nothing_is_left_behind_even_after_an_error() -> None:
    model = make("gpt2")
    for look in (attention_weights, residual_stream):
        look(model, IDS)
        with pytest.raises(IndexError):
            look(model, [99])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_bf16_rows_still_sum_to_about_one() -> None:
    weights = attention_weights(make("llama").bfloat16(), IDS)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 20), atol=0.02, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "openai-gpt", "gpt_neo", "llama"])
def test_imported_models_look_where_transformers_looks(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    import gptcli
    from gptcli.exchange.transfer import import_model

    theirs = hugging_face.save(name, tmp_path / "hf")
    theirs.set_attn_implementation("eager")
    import_model(str(tmp_path / "hf"), tmp_path / "ours", check_logits=False)
    ours = gptcli.load(tmp_path / "ours").model
    ids = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        expected = theirs(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(attention_weights(ours, ids), torch.cat(expected.attentions), atol=1e-5, rtol=1e-4)
    # transformers shows the last state after the final norm
    before_last = torch.cat(expected.hidden_states[:-1])
    torch.testing.assert_close(residual_stream(ours, ids)[0][:-1], before_last, atol=1e-4, rtol=1e-4)

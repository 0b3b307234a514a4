"""Packed weights: the same model in oneDNN's layout, nearly the same in int8."""

from __future__ import annotations

import pytest
import torch

from gptcli.config.schema import ModelConfig, SamplingParams
from gptcli.generate import Engine
from gptcli.generate import pack as packing
from gptcli.generate.pack import BlockedLinear, Int8Linear, pack
from gptcli.model import GPT
from tests.conftest import Tiny, gpt


def make(**shape: object) -> GPT:
    base = {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 32, "vocab_size": 70, "init_std": 0.3}
    model = GPT(ModelConfig(**{**base, **shape}))  # type: ignore[arg-type]
    model.init_weights(0)
    return model.eval()


SHAPES = [{}, {"tie_embeddings": False, "bias": False}, {"activation": "swiglu", "n_kv_head": 1, "position": "rope"}]


@pytest.mark.parametrize("shape", SHAPES)
def test_blocked_is_the_same_model(shape: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "LARGE", 0)
    plain, packed = make(**shape), pack(make(**shape))
    assert any(isinstance(m, BlockedLinear) for m in packed.modules())
    x = torch.randint(0, 70, (3, 9))
    with torch.inference_mode():
        torch.testing.assert_close(packed(x).logits, plain(x).logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(packed(x, targets=x).logprobs, plain(x, targets=x).logprobs, atol=1e-4, rtol=1e-4)
    params = SamplingParams(max_new_tokens=40, temperature=0.0)
    prompts = [[1, 2, 3], [4], list(range(20))]
    one, two = ([(t.key, t.id) for t in Engine(m).tokens(prompts, params)] for m in (plain, packed))
    assert one == two


def test_small_matrices_stay_as_they_are() -> None:
    assert not any(isinstance(m, BlockedLinear) for m in pack(make()).modules())


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_nearly_the_same_model(shape: dict[str, object]) -> None:
    plain, packed = make(**shape), pack(make(**shape), int8=True)
    x = torch.randint(0, 70, (4, 16))
    with torch.inference_mode():
        before, after = plain(x).logits, packed(x).logits
        assert not torch.equal(before, after)
        assert ((before - after).norm() / before.norm()).item() < 0.1
        assert after.shape == before.shape


def test_int8_rows_do_not_influence_one_another() -> None:
    packed = pack(make(), int8=True)
    params = SamplingParams(max_new_tokens=30, temperature=0.8)
    prompts = [[1, 2, 3], [4], list(range(20))]
    together: dict[object, list[int]] = {i: [] for i in range(3)}
    for token in Engine(packed).tokens(prompts, params):
        together[token.key].append(token.id)
    alone = [[t.id for t in Engine(packed).tokens([ids], params, [i])] for i, ids in enumerate(prompts)]
    assert [together[i] for i in range(3)] == alone


def test_int8_rounds_each_output_by_its_own_scale() -> None:
    weight = torch.randn(6, 8) * torch.tensor([1e-3, 1, 10, 100, 1e3, 0.1])[:, None]
    form = Int8Linear(weight, None)
    assert ((form.weight - weight).abs() <= form.scale[:, None] / 2 + 1e-6).all()
    x = torch.randn(2, 8)
    exact = x @ form.weight.T
    on_device, elsewhere = form(x), Int8Linear(weight, torch.ones(6))
    elsewhere.packed = None  # as on a GPU: widened for the product
    torch.testing.assert_close(elsewhere(x), exact + 1, atol=1e-3, rtol=1e-4)
    assert ((on_device - exact).abs().amax(0) <= 0.05 * weight.norm(dim=1) * x.norm(dim=1).max()).all()


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="oneDNN's sums of int8 need VNNI")
def test_a_wide_head_rounds_as_the_other_matrices_do(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(50, 32), torch.randn(3, 1, 32)
    narrow = Int8Linear(weight, None)
    monkeypatch.setattr(packing, "WIDE", 50)
    wide = Int8Linear(weight, None)
    assert wide.packed is None
    torch.testing.assert_close(wide(x), narrow(x), atol=1e-4, rtol=1e-5)


def test_the_command_line(tiny: Tiny) -> None:
    tiny.train()
    row = gpt("eval", "-c", tiny.run_dir, "--int8", "--json", "-q").json()
    assert abs(row["int8_cost"]) < 0.02
    assert row["perplexity"] == pytest.approx(row["perplexity_unpacked"] * (1 + row["int8_cost"]))
    assert gpt("generate", "line", "-c", tiny.run_dir, "--int8", "-n", "5").code == 0

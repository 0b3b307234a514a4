"""The model: causality, caches, padding, packing, tying, initialisation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcli.config.flops import count_params
from gptcli.config.schema import ModelConfig, RopeScaling
from gptcli.model import GPT, KVCache

SHAPES = {
    "gpt1": {"norm_position": "post", "residual_init": "plain"},
    "gpt2": {},
    "gpt3": {"attention_pattern": "alternating", "band_width": 3},
    "banded": {"attention_pattern": "banded", "band_width": 2, "activation": "relu"},
    "modern": {"position": "rope", "norm": "rmsnorm", "qk_norm": True, "bias": False, "activation": "relu2"},
    "llama": {
        "position": "rope",
        "norm": "rmsnorm",
        "bias": False,
        "activation": "swiglu",
        "n_kv_head": 1,
        "rope_scaling": RopeScaling(kind="llama3", factor=4.0, original_context_length=8),
    },
    "neo": {"attention_pattern": "alternating", "band_width": 4, "qkv_bias": False, "scale_attention": False},
    "alibi": {"position": "alibi", "attention_pattern": "alternating", "band_width": 5, "init": "uniform"},
    "sinusoidal": {"position": "sinusoidal", "norm": "rmsnorm", "norm_position": "post"},
    "untied": {"tie_embeddings": False, "n_segment": 2, "activation": "gelu", "position": "none"},
}


def make(name: str, **changes: object) -> GPT:
    base = {"n_layer": 3, "n_head": 2, "n_embd": 16, "context_length": 24, "vocab_size": 37, "init_std": 0.3}
    model = GPT(ModelConfig(**{**base, **SHAPES[name], **changes}))
    model.init_weights(0)
    return model.eval()


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 37, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("packed", [False, True])
def test_later_tokens_change_nothing_before(name: str, packed: bool) -> None:
    model, x = make(name), tokens(2, 20)
    documents = (torch.arange(20) // 7).expand(2, 20) if packed else None
    before = model(x, document_ids=documents).logits
    for t in (1, 8, 19):
        changed = x.clone()
        changed[:, t] = (x[:, t] + 1) % 37
        after = model(changed, document_ids=documents).logits
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize("name", SHAPES)
def test_later_tokens_change_nothing_before_with_a_cache(name: str) -> None:
    model, x = make(name), tokens(2, 20)
    changed = x.clone()
    changed[:, 12:] = (x[:, 12:] + 1) % 37
    outputs = []
    for ids in (x, changed):
        cache = KVCache(model.config, 2, 20)
        outputs.append(torch.cat([model(ids[:, i : i + 4], cache=cache).logits for i in range(0, 20, 4)], 1))
    assert torch.equal(outputs[0][:, :12], outputs[1][:, :12])


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(1, 19), max_size=6))
def test_cached_equals_uncached_for_any_chunks(name: str, cuts: list[int]) -> None:
    model, x = make(name), tokens(2, 20)
    edges = sorted({0, 20, *cuts})
    cache = KVCache(model.config, 2, 20)
    parts = [model(x[:, a:b], cache=cache).logits for a, b in itertools.pairwise(edges)]
    torch.testing.assert_close(torch.cat(parts, 1), model(x).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name: str, side: str) -> None:
    model, x = make(name), tokens(1, 9)
    alone = model(x).logits
    for pad in (1, 5):
        filler = torch.full((1, pad), 36)
        row = torch.cat([filler, x] if side == "left" else [x, filler], 1)
        mask = torch.cat(
            [torch.zeros(1, pad), torch.ones(1, 9)] if side == "left" else [torch.ones(1, 9), torch.zeros(1, pad)],
            1,
        )
        padded = model(row, attention_mask=mask.bool()).logits
        part = padded[:, pad:] if side == "left" else padded[:, :9]
        torch.testing.assert_close(part, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_rows_in_one_cache_equal_single_rows(name: str, side: str) -> None:
    model, lengths = make(name), [3, 8, 5]
    rows = [tokens(1, n + 4, seed=n) for n in lengths]
    batch, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.bool)
    for i, n in enumerate(lengths):
        place = slice(8 - n, 8) if side == "left" else slice(0, n)
        batch[i, place], mask[i, place] = rows[i][0, :n], True
    cache = KVCache(model.config, 3, 12)
    got = [model(batch, attention_mask=mask, cache=cache, last_only=True).logits]
    assert cache.lengths == lengths
    for step in range(4):
        newest = torch.stack([rows[i][0, n + step] for i, n in enumerate(lengths)])[:, None]
        got.append(model(newest, cache=cache).logits)
    for i, n in enumerate(lengths):
        expected = model(rows[i]).logits[0, n - 1 :]
        torch.testing.assert_close(torch.cat(got, 1)[i], expected, atol=1e-5, rtol=1e-5)


def test_cache_rows_can_be_selected_and_repeated() -> None:
    model, x = make("gpt3"), tokens(3, 6)
    cache = KVCache(model.config, 3, 10)
    model(x, cache=cache)
    cache.select([2, 0, 0])
    newest = torch.tensor([[1], [2], [3]])
    got = model(newest, cache=cache).logits[:, -1]
    for i, row in enumerate([2, 0, 0]):
        expected = model(torch.cat([x[row], newest[i]])[None]).logits[0, -1]
        torch.testing.assert_close(got[i], expected, atol=1e-5, rtol=1e-5)


def test_cache_refuses_more_than_it_holds() -> None:
    model = make("gpt2")
    with pytest.raises(ValueError, match="holds 4 tokens, 5 are needed"):
        model(tokens(1, 5), cache=KVCache(model.config, 1, 4))


@pytest.mark.parametrize("name", SHAPES)
def test_packed_documents_equal_single_documents(name: str) -> None:
    model = make(name)
    first, second = tokens(1, 5, seed=1), tokens(1, 8, seed=2)
    ids = torch.tensor([[0] * 5 + [1] * 8])
    packed = model(torch.cat([first, second], 1), document_ids=ids).logits
    torch.testing.assert_close(packed[:, :5], model(first).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[:, 5:], model(second).logits, atol=1e-5, rtol=1e-5)


def test_a_banded_layer_sees_its_band_alone() -> None:
    model, x = make("banded", n_layer=1, position="none"), tokens(1, 10)
    changed = x.clone()
    changed[0, 4] = (x[0, 4] + 1) % 37
    same = (model(x).logits == model(changed).logits).all(-1)[0]
    assert same.tolist() == [True] * 4 + [False] * 2 + [True] * 4  # band_width 2: itself and the next


def test_last_only_is_the_last_real_token() -> None:
    model, x = make("gpt2"), tokens(2, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]]).bool()
    full = model(x, attention_mask=mask).logits
    last = model(x, attention_mask=mask, last_only=True).logits
    torch.testing.assert_close(last[:, 0], torch.stack([full[0, 2], full[1, 5]]))


def test_vocabulary_padding_never_shows() -> None:
    model = make("gpt2")
    assert model.wte.weight.shape[0] == 64
    x = tokens(1, 8)
    before = model(x)
    with torch.no_grad():
        model.wte.weight[37:] = 100.0
    assert before.logits.shape[-1] == 37
    assert torch.equal(model(x).logits, before.logits)
    scored = model(x, targets=x).logprobs
    torch.testing.assert_close(scored, before.logits.log_softmax(-1).gather(2, x[..., None])[..., 0])


def test_initialisation_is_derived_from_the_seed_and_scaled() -> None:
    config = ModelConfig(n_layer=8, n_head=2, n_embd=64, context_length=64, vocab_size=512, wpe_init_std=0.01)
    one, two, other = GPT(config), GPT(config), GPT(config)
    one.init_weights(1)
    torch.rand(7)  # a shared generator would notice
    two.init_weights(1)
    other.init_weights(2)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.wte.weight, other.wte.weight)
    assert one.wte.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert one.wpe.weight.std().item() == pytest.approx(0.01, rel=0.05)
    projections = torch.cat([block.mlp.c_proj.weight.flatten() for block in one.h])
    assert projections.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.03)


def test_uniform_initialisation_has_the_same_spread() -> None:
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=64, context_length=8, vocab_size=512, init="uniform"))
    model.init_weights(1)
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert model.wte.weight.abs().max().item() <= 0.02 * math.sqrt(3)


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_counted_by_formula(name: str) -> None:
    model = make(name, vocab_pad_multiple=1, n_inner=24)
    assert count_params(model.config) == sum(p.numel() for p in model.parameters())


def test_tied_head_has_no_tensor_and_untied_has() -> None:
    assert "lm_head.weight" not in make("gpt2").state_dict()
    assert "lm_head.weight" in make("untied").state_dict()


def test_first_loss_of_a_fresh_model_is_ln_vocab() -> None:
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=32, vocab_size=1000)
    model = GPT(config)
    model.init_weights(0)
    x = torch.randint(0, 1000, (8, 32))
    assert -model(x, targets=x.roll(-1, 1)).logprobs.mean().item() == pytest.approx(math.log(1000), rel=0.01)


def test_parameter_counts_by_formula_equal_the_built_model() -> None:
    from gptcli.config.flops import count_params

    for name in SHAPES:
        model = make(name, vocab_pad_multiple=1, scalar_heads={"value": 1, "reward": 3})
        assert sum(p.numel() for p in model.parameters()) == count_params(model.config), name


def test_segments_and_scalar_heads() -> None:
    model = make("untied", scalar_heads={"value": 1, "choice": 4})
    x = tokens(2, 6)
    plain, marked = model(x), model(x, segment_ids=torch.ones(2, 6, dtype=torch.long))
    assert plain.scalars["value"].shape == (2, 6, 1)
    assert plain.scalars["choice"].shape == (2, 6, 4)
    assert not torch.equal(plain.logits, marked.logits)

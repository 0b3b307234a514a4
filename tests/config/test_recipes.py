"""The shipped recipes are what the papers say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptcli.config.flops import (
    PF_DAY,
    count_non_embedding,
    count_params,
    flops_per_token,
    flops_per_token_with_attention,
    params_by_part,
)
from gptcli.config.load import load_recipe
from gptcli.config.schema import ModelConfig
from gptcli.config.shipped import find_recipe, shipped_recipes
from gptcli.model import GPT

# Radford et al. 2018 and 2019, Brown et al. 2020. 13b: table 2.1 prints a width of 5,140, which 40 heads do
# not divide; 5,120 gives table D.1's 12,850M. xl: it prints 24 heads of 128, which do not make 2,048.
SHAPES = {  # layers, width, heads, context, parameters
    "gpt1": (12, 768, 12, 512, 116_534_784),
    "gpt2-small": (12, 768, 12, 1024, 124_439_808),
    "gpt2-medium": (24, 1024, 16, 1024, 354_823_168),
    "gpt2-large": (36, 1280, 20, 1024, 774_030_080),
    "gpt2-xl": (48, 1600, 25, 1024, 1_557_611_200),
    "gpt3-small": (12, 768, 12, 2048, 125_226_240),
    "gpt3-medium": (24, 1024, 16, 2048, 355_871_744),
    "gpt3-large": (24, 1536, 16, 2048, 760_300_032),
    "gpt3-xl": (24, 2048, 16, 2048, 1_315_723_264),
    "gpt3-2.7b": (32, 2560, 32, 2048, 2_651_553_280),
    "gpt3-6.7b": (32, 4096, 32, 2048, 6_658_404_352),
    "gpt3-13b": (40, 5120, 40, 2048, 12_853_386_240),
    "gpt3-175b": (96, 12288, 96, 2048, 174_604_259_328),
}
GPT3 = {  # tokens in a batch (table 2.1), learning rate, millions of parameters and PF-days (table D.1)
    "gpt3-small": (0.5e6, 6.0e-4, 125, 2.60),
    "gpt3-medium": (0.5e6, 3.0e-4, 356, 7.42),
    "gpt3-large": (0.5e6, 2.5e-4, 760, 15.8),
    "gpt3-xl": (1e6, 2.0e-4, 1_320, 27.5),
    "gpt3-2.7b": (1e6, 1.6e-4, 2_650, 55.2),
    "gpt3-6.7b": (2e6, 1.2e-4, 6_660, 139),
    "gpt3-13b": (2e6, 1.0e-4, 12_850, 268),
    "gpt3-175b": (3.2e6, 0.6e-4, 174_600, 3_640),
}


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda p: p.stem)
def test_shipped_recipe_loads_and_says_what_it_is(path):
    recipe = load_recipe(path.stem)
    assert recipe.run.name == path.stem
    title = path.read_text("utf-8").split("\n")[0]
    assert title.startswith("# ")
    assert len(title) > 20


def test_a_recipe_is_found_with_and_without_its_suffix(tmp_path, monkeypatch):
    assert find_recipe("gpt2-xl") == find_recipe("gpt2-xl.yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2-xl.yaml").write_text("")
    assert find_recipe("gpt2-xl.yaml").resolve() == tmp_path / "gpt2-xl.yaml"  # a file comes first
    assert find_recipe("gpt2-xl").resolve() != tmp_path / "gpt2-xl.yaml"


@pytest.mark.parametrize("name", SHAPES)
def test_shape_and_exact_parameters(name):
    layers, width, heads, context, params = SHAPES[name]
    m = load_recipe(name).model
    assert (m.n_layer, m.n_embd, m.n_head, m.context_length) == (layers, width, heads, context)
    assert m.vocab_size == (40478 if name == "gpt1" else 50257)
    assert count_params(m) == params


@pytest.mark.parametrize("name", SHAPES)
def test_built_model_has_as_many_parameters_as_the_formula(name):
    m = load_recipe(name).model
    with torch.device("meta"):
        model = GPT(m)
    padding = (m.padded_vocab - m.vocab_size) * m.n_embd
    assert sum(p.numel() for p in model.parameters()) - padding == count_params(m)


def test_architectures_differ_where_the_papers_do():
    for name in SHAPES:
        m = load_recipe(name).model
        assert (m.norm_position, m.dropout) == (("post", 0.1) if name == "gpt1" else ("pre", 0.0))
        assert m.attention_pattern == ("alternating" if name in GPT3 else "dense")
        assert (m.activation, m.norm, m.position, m.bias) == ("gelu_tanh", "layernorm", "learned", True)
        assert m.tie_embeddings
        assert m.inner == 4 * m.n_embd
        assert m.residual_init == ("plain" if name == "gpt1" else "scaled")


def test_gpt3s_token_embedding():
    parts = params_by_part(load_recipe("gpt3-175b").model)
    assert parts["token_embedding"] == 617_558_016
    assert parts["position_embedding"] == 2048 * 12288


@pytest.mark.parametrize("name", GPT3)
def test_gpt3_costs_what_table_d1_says(name):
    _, _, millions, pf_days = GPT3[name]
    recipe = load_recipe(name)
    assert count_params(recipe.model) / 1e6 == pytest.approx(millions, rel=5e-3)
    assert flops_per_token(recipe.model) * recipe.train.max_tokens / PF_DAY == pytest.approx(pf_days, rel=5e-3)


@pytest.mark.parametrize("name", GPT3)
def test_gpt3_trains_as_published(name):
    batch_tokens, lr, _, _ = GPT3[name]
    recipe = load_recipe(name)
    o, t = recipe.optim, recipe.train
    assert o.lr == lr
    assert t.global_batch_size * 2048 == pytest.approx(batch_tokens, rel=0.05)  # the paper rounds powers of two
    assert (o.warmup_tokens, o.decay_tokens, t.max_tokens) == (375_000_000, 260_000_000_000, 300_000_000_000)
    assert (o.schedule, o.min_lr_ratio, o.warmup_steps, o.decay_steps) == ("cosine", 0.1, 0, None)
    assert (o.name, o.betas, o.eps, o.weight_decay, o.grad_clip) == ("adamw", (0.9, 0.95), 1e-8, 0.1, 1.0)
    assert t.batch_ramp.start * 2048 == 32_768
    assert 4e9 <= t.batch_ramp.tokens <= 12e9
    assert recipe.tokenizer == "gpt2"


def test_gpt3s_ramps_grow_with_the_model():
    ramps = [load_recipe(name).train.batch_ramp.tokens for name in GPT3]
    assert ramps == sorted(ramps)
    assert (ramps[0], ramps[-1]) == (4_000_000_000, 12_000_000_000)


def test_gpt1_trains_as_published():
    recipe = load_recipe("gpt1")
    o, t = recipe.optim, recipe.train
    assert (o.lr, o.warmup_steps, o.schedule, o.min_lr_ratio) == (2.5e-4, 2000, "cosine", 0.0)
    assert (o.betas, o.eps, o.weight_decay) == ((0.9, 0.999), 1e-8, 0.01)
    assert t.global_batch_size == 64
    assert recipe.tokenizer == "bpe:40478"


@pytest.mark.parametrize("name", [n for n in SHAPES if n.startswith("gpt2")])
def test_gpt2_has_the_papers_batch(name):
    assert load_recipe(name).train.global_batch_size == 512


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 300), st.integers(1, 70))
def test_parameters_follow_the_closed_form(layers, width, vocab, context):
    L, d, V, T = layers, width, vocab, context
    shape = {"n_layer": L, "n_head": 1, "n_embd": d, "vocab_size": V, "context_length": T}
    pre, post = ModelConfig(**shape), ModelConfig(**shape, norm_position="post")
    n = V * d + T * d + L * (12 * d * d + 13 * d) + 2 * d
    assert count_params(pre) == n
    assert count_params(post) == n - 2 * d
    assert count_non_embedding(pre) == n - V * d - T * d
    assert count_params(ModelConfig(**shape, tie_embeddings=False)) == n + V * d
    assert flops_per_token(pre) == 6 * n
    # PaLM's appendix B: 6 (N - positions) + 12 L d T
    assert flops_per_token_with_attention(pre, T) == 6 * (n - T * d) + 12 * L * d * T

"""Position schemes against their papers' figures and transformers' implementation."""

from __future__ import annotations

import math

import pytest
import torch

from gptcli.config.schema import ModelConfig, RopeScaling
from gptcli.model.positions import alibi_slopes, rotary_angles, sinusoids, stretched


def test_alibi_slopes_are_the_papers() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(16).tolist() == pytest.approx([2 ** (-0.5 * i) for i in range(1, 17)])
    # 12 heads: the 8 of the power below, then every other one of the 16
    assert alibi_slopes(12).tolist() == pytest.approx(
        [2.0**-i for i in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    )


def test_sinusoids_by_hand() -> None:
    config = ModelConfig(n_layer=1, n_head=1, n_embd=4, context_length=8, vocab_size=5)
    got = sinusoids(config, torch.tensor([[0, 3]]))[0]
    assert got[0].tolist() == [0, 1, 0, 1]
    assert got[1].tolist() == pytest.approx([math.sin(3), math.cos(3), math.sin(0.03), math.cos(0.03)])


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_stretched_rope_equals_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {"rope_type": kind, "factor": 8.0, "rope_theta": 500000.0}
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    theirs = LlamaRotaryEmbedding(
        transformers.LlamaConfig(
            hidden_size=64, num_attention_heads=2, max_position_embeddings=512, rope_parameters=scaling
        )
    )
    config = ModelConfig(
        n_layer=1,
        n_head=2,
        n_embd=64,
        context_length=512,
        vocab_size=5,
        position="rope",
        rope_theta=500000.0,
        rope_scaling=RopeScaling(kind=kind, factor=8.0, original_context_length=64),
    )
    positions = torch.arange(512)[None]
    cos, sin = theirs(torch.zeros(1), positions)
    got_cos, got_sin = rotary_angles(config, positions)
    torch.testing.assert_close(got_cos[:, 0], cos[..., :16], atol=1e-5, rtol=0)
    torch.testing.assert_close(got_sin[:, 0], sin[..., :16], atol=1e-5, rtol=0)


def test_factor_one_stretches_nothing() -> None:
    frequencies = torch.logspace(0, -4, 16)
    for kind in ("linear", "llama3"):
        torch.testing.assert_close(stretched(frequencies, RopeScaling(kind=kind, factor=1.0)), frequencies)

"""The step of a GPU: its view of the cache, its sizes. What it writes is in test_gpu.py."""

from __future__ import annotations

import pytest
import torch

from gptcli.config.schema import ModelConfig
from gptcli.generate.graph import GraphDecode, rounded
from gptcli.model import GPT, KVCache
from gptcli.model.kv_cache import SlotView


def make(**shape: object) -> GPT:
    base = {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 32, "vocab_size": 70, "init_std": 0.3}
    model = GPT(ModelConfig(**{**base, **shape}))  # type: ignore[arg-type]
    model.init_weights(0)
    return model.eval()


SHAPES = [
    {},
    {"position": "rope", "n_kv_head": 1, "activation": "swiglu"},
    {"attention_pattern": "alternating", "band_width": 4},
    {"position": "alibi"},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_view_of_slots_is_the_cache(shape: dict[str, object]) -> None:
    model = make(**shape)
    prompts = [[1, 2, 3, 4, 5], [6], [7, 8]]
    with torch.inference_mode():
        cache = KVCache(model.config, 4, 16)
        for row, ids in enumerate(prompts):
            model(torch.tensor([ids]), cache=cache.rows(row, row + 1))
        fixed = SlotView([k.clone() for k in cache.k], [v.clone() for v in cache.v], torch.tensor([[5], [1], [2], [0]]))
        tokens = torch.tensor([[9], [10], [11], [0]])
        plain = model(tokens, cache=cache, last_only=True).logits
        ours = model(tokens, cache=fixed, last_only=True).logits
    torch.testing.assert_close(ours[:3], plain[:3], atol=1e-5, rtol=1e-5)


def test_sizes_are_few() -> None:
    assert [rounded(n, 16) for n in (1, 2, 16, 17, 64, 65)] == [1, 16, 16, 32, 64, 128]
    assert [rounded(n, 2) for n in (1, 2, 3, 17)] == [1, 2, 4, 32]


def test_a_graphs_cache_is_hardly_larger_than_its_rows() -> None:
    """One costs nothing to make, and a large model's cache does."""
    graph = GraphDecode(make())
    assert graph.size(3, 20) == (4, 32)
    assert graph.size(1, 7) == (1, 16)
    assert graph.size(5, 1000) == (8, 32)  # no more than the context

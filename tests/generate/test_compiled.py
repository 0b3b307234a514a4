"""The compiled step: the same tokens as without, rows joining and leaving, the view sliding."""

from __future__ import annotations

import pytest
import torch

from gptcli.config.gpus import has_cpp_compiler
from gptcli.config.schema import ModelConfig, SamplingParams
from gptcli.errors import UserError
from gptcli.generate import Engine, compiled
from gptcli.generate.compiled import CompiledDecode, GraphDecode, rounded
from gptcli.model import GPT, KVCache
from gptcli.model.kv_cache import SlotView
from tests.conftest import Tiny, gpt


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


def test_without_a_compiler_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"no C\+\+ compiler"):
        CompiledDecode(make())


@pytest.mark.slow
@pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler")
def test_compiled_texts_are_the_same() -> None:
    model = make()
    plain, quick = Engine(model), Engine(model)
    quick.compile()
    prompts = [[1, 2, 3], [4], list(range(20)), [7, 7, 7]]
    params = SamplingParams(max_new_tokens=40, top_k=20)
    expected = {(t.key, t.id) for t in plain.tokens(prompts, params)}
    assert {(t.key, t.id) for t in quick.tokens(prompts, params)} == expected
    # two rows at a time: others join as these end
    assert {(t.key, t.id) for t in quick.tokens(prompts, params, max_rows=2)} == expected


@pytest.mark.slow
@pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler")
def test_two_programs_serve_all_sizes() -> None:
    """Rows as many as heads or slots, caches of other strides: none of it is taken for a constant."""
    model = make(n_head=4, context_length=128)
    decode = CompiledDecode(model)
    torch._dynamo.utils.counters.clear()
    for rows, batch, capacity, written in [
        (4, 4, 32, 8), (3, 4, 32, 20), (3, 4, 64, 33), (8, 8, 8, 7), (64, 64, 100, 2), (1, 1, 16, 1), (1, 4, 64, 40),
        (2, 2, 2, 1), (32, 40, 128, 127),
    ]:  # fmt: skip
        caches = [KVCache(model.config, batch, capacity) for _ in range(2)]
        with torch.inference_mode():
            prompts = torch.randint(0, 70, (rows, written), generator=torch.Generator().manual_seed(rows))
            tokens = prompts[:, -1].tolist()
            for cache in caches:
                model(prompts, cache=cache.rows(0, rows), last_only=True)
                cache.set_length(rows - 1, 0)  # ragged; alone, all that there is
            plain = model(torch.tensor(tokens)[:, None], cache=caches[0].rows(0, rows), last_only=True).logits
            torch.testing.assert_close(decode(tokens, caches[1]), plain[:, -1], atol=1e-4, rtol=1e-4)
        assert caches[0].lengths == caches[1].lengths
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_compiling_that_was_stopped_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a chat comes in those seconds."""
    monkeypatch.setattr(compiled, "has_cpp_compiler", lambda: True)
    decode, cache, seen = CompiledDecode(make()), KVCache(make().config, 1, 8), []

    def step(*inputs: object) -> torch.Tensor:
        seen.append(decode._compiled.copy())
        if len(seen) == 1:
            raise KeyboardInterrupt
        return torch.zeros(1, 70)

    monkeypatch.setattr(decode, "_step", step)
    with pytest.raises(KeyboardInterrupt):
        decode([1], cache)
    assert cache.lengths == [0]
    decode([1], cache)
    decode([1], cache)
    assert seen == [set(), set(), {True}]
    assert cache.lengths == [2]


@pytest.mark.slow
@pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler")
def test_any_number_of_models_can_be_compiled() -> None:
    engines = [Engine(make(n_embd=32 + 2 * i)) for i in range(9)]
    for engine in engines:
        engine.compile()
        assert len(list(engine.tokens([[5]], SamplingParams(max_new_tokens=3)))) == 3


@pytest.mark.slow
@pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler")
def test_the_command_line(tiny: Tiny) -> None:
    tiny.train("train.max_steps=2")
    arguments = ("generate", "line", "-c", tiny.run_dir, "--max-new-tokens", "30", "--seed", "3")
    assert gpt(*arguments, "--compile").out == gpt(*arguments).out

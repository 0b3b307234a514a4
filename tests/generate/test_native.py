"""native.c says what the model says, whatever its shape, and draws what `choose` draws."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.config.schema import LoraBlock, ModelConfig, SamplingParams
from gptcli.generate import Engine, native
from gptcli.generate.engine import Completion
from gptcli.generate.native import Drawing, NativeDecode, suits
from gptcli.generate.pack import pack
from gptcli.generate.sampling import choose, keep_top_k
from gptcli.generate.scheduler import Request, Token
from gptcli.model import GPT, KVCache
from gptcli.model.lora import add_lora
from gptcli.randomness import uniforms
from gptcli.tokenizer.build import byte_tokenizer

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler")

SHAPES = [
    {},
    {"bias": False, "activation": "gelu"},
    {"activation": "relu", "norm": "rmsnorm"},
    {"activation": "relu2", "scale_attention": False, "qkv_bias": False},
    {"position": "rope", "n_kv_head": 1, "activation": "swiglu", "norm": "rmsnorm", "bias": False,
     "tie_embeddings": False, "n_inner": 50},
    {"position": "rope", "n_head": 4, "n_kv_head": 2, "qk_norm": True},
    {"position": "alibi", "n_head": 3, "n_embd": 48},
    {"position": "alibi", "attention_pattern": "alternating", "band_width": 4},
    {"position": "sinusoidal", "attention_pattern": "banded", "band_width": 1},
    {"position": "none", "norm_position": "post"},
    {"norm_position": "post", "norm": "rmsnorm", "activation": "swiglu"},
    {"n_embd": 35, "n_head": 5, "n_inner": 7, "vocab_size": 3, "n_segment": 2},
    {"n_embd": 128, "n_layer": 1, "scalar_heads": {"value": 1}},
]  # fmt: skip


def make(**shape: object) -> GPT:
    base = {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 32, "vocab_size": 70, "init_std": 0.3}
    model = GPT(ModelConfig(**{**base, **shape}))  # type: ignore[arg-type]
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)  # biases and norms are not 0 and 1
    return model.eval()


def read(model: GPT, cache: KVCache, prompts: list[list[int]]) -> None:
    for row, ids in enumerate(prompts):
        model(torch.tensor([ids]), cache=cache.rows(row, row + 1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.inference_mode()
def test_it_is_the_model(shape: dict[str, object]) -> None:
    """Rows of several lengths, three tokens one after the other; 1e-5 of the largest logit is rounding."""
    model = make(**shape)
    decode, caches = NativeDecode(model), [KVCache(model.config, 8, 20) for _ in range(2)]
    prompts = [[(3 * i + j) % model.vocab_size for j in range(1 + 3 * i)] for i in range(6)]
    for cache in caches:
        read(model, cache, prompts)
    for step in range(3):
        tokens = [(row + 5 * step) % model.vocab_size for row in range(6)]
        plain = model(torch.tensor(tokens)[:, None], cache=caches[0].rows(0, 6), last_only=True).logits[:, -1]
        ours = decode(tokens, caches[1])
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5 * plain.abs().max().item())
        assert caches[0].lengths == caches[1].lengths
    for ours, theirs in zip((*caches[1].k, *caches[1].v), (*caches[0].k, *caches[0].v), strict=True):
        torch.testing.assert_close(ours[:6], theirs[:6], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="no products of int8")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.inference_mode()
def test_int8_is_the_packed_model(shape: dict[str, object]) -> None:
    """The same numbers are multiplied; a row's activations may round to the neighbouring step."""
    model = pack(make(**{"n_embd": 64, **shape}), int8=True)
    decode, caches = NativeDecode(model), [KVCache(model.config, 6, 20) for _ in range(2)]
    for cache in caches:
        read(model, cache, [[(3 * i + j) % model.vocab_size for j in range(1 + 3 * i)] for i in range(6)])
    tokens = [row % model.vocab_size for row in range(6)]
    plain = model(torch.tensor(tokens)[:, None], cache=caches[0], last_only=True).logits[:, -1]
    torch.testing.assert_close(decode(tokens, caches[1]), plain, rtol=0, atol=0.02 * plain.abs().max().item())


@pytest.mark.parametrize("int8", [False, True])
@torch.inference_mode()
def test_a_row_does_not_depend_on_its_neighbours_to_the_last_bit(int8: bool) -> None:
    model = make(n_embd=96, n_head=3)
    if int8 and not suits(pack(model, int8=True), torch.float32):
        pytest.skip("no products of int8")
    decode, cache = NativeDecode(model), KVCache(model.config, 7, 20)
    prompts = [[1 + i, *range(i)] for i in range(7)]
    read(model, cache, prompts)
    together = decode(list(range(7)), cache)
    for row in range(7):
        alone = KVCache(model.config, 1, 20)
        for ours, theirs in zip((*alone.k, *alone.v), (*cache.k, *cache.v), strict=True):
            ours[0, :, : row + 1] = theirs[row, :, : row + 1]
        alone.set_length(0, row + 1)
        assert torch.equal(decode([row], alone)[0], together[row])


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[4], SHAPES[10], SHAPES[11]], ids=str)
@torch.inference_mode()
def test_threads_share_the_work_and_change_no_bit(
    shape: dict[str, object], int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than rows, heads or outputs, too."""
    model = make(**shape)
    if int8 and not suits(pack(model, int8=True), torch.float32):
        pytest.skip("no products of int8")
    monkeypatch.setattr(native, "EACH_THREAD", 1)
    found = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        decode, cache = NativeDecode(model), KVCache(model.config, 5, 20)
        read(model, cache, [[i % model.vocab_size, 1] for i in range(5)])
        logits = decode([2] * 5, cache)
        drawing = Drawing(torch.full((5,), model.vocab_size), torch.ones(5), torch.rand(4, 5, generator=seeded()))
        ids, logprobs = decode.write([1] * 5, cache, drawing, ends=())
        found.append((logits, ids, logprobs, decode.choose(logits, drawing)))
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0])
        assert other[1:] == found[0][1:]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("k", [1, 2, 5, 70])
@torch.inference_mode()
def test_it_draws_what_choose_draws(k: int, temperature: float) -> None:
    model = make()
    decode, caches = NativeDecode(model), [KVCache(model.config, 16, 20) for _ in range(2)]
    for cache in caches:
        read(model, cache, [[i, 60 - i] for i in range(16)])
    tokens, rows = list(range(16)), range(16)
    logits = decode(tokens, caches[0])
    filtered = keep_top_k(logits, k) / (temperature or 1.0)
    right = choose(filtered, temperature, [7] * 16, list(rows), [0] * 16)
    numbers = torch.from_numpy(uniforms("sample", ((7, row, 0) for row in rows))).float()[None]
    drawing = Drawing(torch.tensor([k] * 16), torch.tensor([temperature] * 16), numbers)
    assert decode.choose(logits, drawing) == right.tolist()
    ids, logprobs = decode.write(tokens, caches[1], drawing, ends=())
    assert ids == [right.tolist()]
    assert logprobs is not None
    told = logits.log_softmax(-1).gather(1, right[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(logprobs[0]), told, rtol=1e-4, atol=1e-5)


def test_ties_with_the_last_of_the_top_k_stay() -> None:
    model = make()
    with torch.no_grad():
        model.wte.weight[10:20] = model.wte.weight[10]
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(model.wte.weight[10] * 10)  # so those ten are the likeliest
    engine = Engine(model)
    params = SamplingParams(max_new_tokens=1, top_k=3)
    drawn = {token.id for token in engine.tokens([[1, 2]] * 300, params)}  # a prompt's next token is torch's
    assert drawn == set(range(10, 20))
    drawn = {t.id for t in engine.tokens([[1, 2]] * 300, SamplingParams(max_new_tokens=2, top_k=3))}
    assert drawn == set(range(10, 20))


@pytest.mark.parametrize("params", [
    SamplingParams(max_new_tokens=25, temperature=0.0),
    SamplingParams(max_new_tokens=25),
    SamplingParams(max_new_tokens=25, top_k=9, temperature=1.7),
    SamplingParams(max_new_tokens=60, top_k=20),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("together", [1, 3, 64])
def test_texts_are_those_of_the_plain_step(params: SamplingParams, together: int) -> None:
    """Rows that join, leave, end by max_new_tokens at other times, and slide; several steps in one call."""
    model = make()
    engine, plain = Engine(model), Engine(model)
    assert isinstance(engine._decode, NativeDecode)
    plain._decode = None
    prompts = [[1, 2, 3], [4], list(range(20)), [7, 7, 7], [1, 2, 3], [30] * 31]
    for e in (engine, engine):  # the second time with a cache that was given back
        ours = list(e.tokens(prompts, params, max_rows=together))
    theirs = list(plain.tokens(prompts, params, max_rows=together))

    def rows(tokens: list[Token]) -> list[list[tuple[int, str | None]]]:
        return [[(t.id, t.finish_reason) for t in tokens if t.key == key] for key in range(len(prompts))]

    assert rows(ours) == rows(theirs)
    for a, b in zip(sorted(ours, key=lambda t: t.key), sorted(theirs, key=lambda t: t.key), strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def told(completions: list[list[Completion]]) -> list[tuple[str, str | None, list[int]]]:
    return [(c.text, c.finish_reason, c.ids) for row in completions for c in row]


def test_several_steps_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, calls = Engine(make()), list[int]()
    decode = engine._decode
    assert isinstance(decode, NativeDecode)
    write = decode.write

    def counting(*given: Any, **more: Any) -> Any:
        calls.append(len(given[2].uniforms))
        return write(*given, **more)

    monkeypatch.setattr(decode, "write", counting)
    monkeypatch.setattr(decode, "steps", lambda: 8)
    assert len(list(engine.tokens([[1], [2]], SamplingParams(max_new_tokens=28)))) == 56
    assert calls == [8, 8, 8, 4]


def test_what_follows_an_end_is_not_told() -> None:
    """An end-of-text ends the call; a stop string is seen after it."""
    tokenizer = byte_tokenizer()
    model = make(vocab_size=257)
    engine, plain = Engine(model, tokenizer), Engine(model, tokenizer)
    plain._decode = None
    assert isinstance(engine._decode, NativeDecode)
    engine._decode.steps = lambda: 16  # type: ignore[method-assign]
    params = SamplingParams(max_new_tokens=28, seed=3, temperature=2.0, stop=["a", "e", "0"])
    prompts = ["ab", "x", "hello"]
    texts = [engine.generate(prompts, params, streams=[s, s + 1, s + 2]) for s in range(20)]
    assert told(texts) == told([plain.generate(prompts, params, streams=[s, s + 1, s + 2]) for s in range(20)])
    assert {c.finish_reason for row in texts for c in row} >= {"stop", "length"}
    with torch.no_grad():
        model.wte.weight[256] *= 3  # ends are likely now
    endless = SamplingParams(max_new_tokens=28, seed=3)
    texts = [engine.generate(prompts, endless, streams=[s, s + 1, s + 2]) for s in range(20)]
    assert told(texts) == told([plain.generate(prompts, endless, streams=[s, s + 1, s + 2]) for s in range(20)])
    assert {c.finish_reason for row in texts for c in row} == {"eos", "length"}


@pytest.mark.parametrize("more", [{"top_p": 0.8}, {"min_p": 0.1}, {"typical_p": 0.5}, {"repetition_penalty": 1.3}])
def test_what_it_cannot_draw_is_drawn_from_its_logits(more: dict[str, float]) -> None:
    model = make()
    engine, plain = Engine(model), Engine(model)
    plain._decode = None
    params = SamplingParams(max_new_tokens=20, **more)
    ours, theirs = ([(t.key, t.id) for t in e.tokens([[1], [2, 3]], params)] for e in (engine, plain))
    assert ours == theirs


def test_a_text_does_not_depend_on_what_runs_beside_it() -> None:
    """Not even where a draw lies within rounding of a border: 250 tokens of one text, alone and beside rows that are
    drawn otherwise, that join and leave."""
    engine = Engine(make(context_length=256, init_std=0.05))
    params = SamplingParams(max_new_tokens=250, seed=1)
    other = SamplingParams(max_new_tokens=9, top_p=0.9)

    def text(neighbours: int) -> list[list[int]]:
        scheduler = engine.scheduler(8)
        for key in range(6):
            scheduler.add(Request(key, [key], params, key), engine.processors(params))
        for key in range(6, 6 + neighbours):
            scheduler.add(Request(key, [key] * (key % 3 + 1), other, key), engine.processors(other))
        tokens = [token for _ in range(10_000) if scheduler.busy for token in scheduler.step()]
        return [[t.id for t in tokens if t.key == key] for key in range(6)]

    assert text(neighbours=0) == text(neighbours=40)


def test_it_follows_weights_that_change() -> None:
    model = make()
    engine, plain = Engine(model), Engine(model)
    plain._decode = None
    for _ in range(3):
        params = SamplingParams(max_new_tokens=10)
        assert [t.id for t in engine.tokens([[1]], params)] == [t.id for t in plain.tokens([[1]], params)]
        for p in model.parameters():
            p.data = p.data * 1.2 + 0.01  # in another place, too


def test_which_models_suit() -> None:
    assert suits(make(), torch.float32)
    assert not suits(make(), torch.bfloat16)
    assert not suits(make().to(torch.bfloat16), torch.bfloat16)
    lora = make()
    add_lora(lora, LoraBlock(rank=2), 0)
    assert not suits(lora, torch.float32)
    packed = Engine(make())
    packed.pack(int8=True)
    assert suits(packed.model, torch.float32) == torch.cpu._is_vnni_supported()
    assert len(list(packed.tokens([[1]], SamplingParams(max_new_tokens=5)))) == 5


def test_without_a_compiler_torch_decodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor with one that fails, nor where nothing can be written."""
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    blocked = tmp_path / "a file"
    blocked.write_text("")
    expected = [t.id for t in Engine(make()).tokens([[1]], SamplingParams(max_new_tokens=9))]
    for path, cache in (("", tmp_path), (str(tmp_path), tmp_path), (os.environ["PATH"], blocked)):
        monkeypatch.setenv("PATH", path)
        monkeypatch.setenv("GPTCLI_CACHE", str(cache))
        native.library.cache_clear()
        engine = Engine(make())
        assert engine._decode is None
        assert [t.id for t in engine.tokens([[1]], SamplingParams(max_new_tokens=9))] == expected
    monkeypatch.undo()
    native.library.cache_clear()


def test_it_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GPTCLI_CACHE", str(tmp_path))
    runs, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: (runs.append(a), run(*a, **k))[1])
    for _ in range(2):
        native.library.cache_clear()
        assert native.library() is not None
    assert len(runs) == 1
    assert [p.suffix for p in (tmp_path / "native").iterdir()] == [".so"]
    native.library.cache_clear()

"""Speculative decoding: distributed as plain sampling, the same as greedy decoding, whatever the draft."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from gptcli.config.schema import ModelConfig, SamplingParams
from gptcli.errors import UserError
from gptcli.generate import Engine, complete, speculative
from gptcli.generate.penalties import History
from gptcli.generate.scheduler import Request, Token, window_start
from gptcli.generate.speculative import SpeculativeScheduler, residual
from gptcli.model import GPT
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.build import byte_tokenizer, char_tokenizer

DRAFTS = ["same", "good", "bad"]
SHAPES = [
    {},
    {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "n_kv_head": 1, "bias": False},
    {"position": "alibi"},
    {"attention_pattern": "alternating", "band_width": 4},
]


def make(seed: int, **shape: object) -> GPT:
    base = {"n_layer": 2, "n_head": 2, "n_embd": 16, "context_length": 64, "vocab_size": 50, "init_std": 0.4}
    model = GPT(ModelConfig(**{**base, **shape}))  # type: ignore[arg-type]
    model.init_weights(seed)
    return model.eval()


def make_draft(kind: str, target: GPT, seed: int = 100) -> GPT:
    """The target itself, one that often agrees, or one that knows nothing of it."""
    if kind == "same":
        return target
    draft = GPT(target.config).eval()
    draft.init_weights(seed)
    if kind == "good":
        with torch.no_grad():
            for mine, theirs in zip(draft.parameters(), target.parameters(), strict=True):
                mine.copy_(0.8 * theirs + 0.2 * mine)
    return draft


def make_pair(kind: str, tokenizer: Tokenizer | None = None, k: int = 4, seed: int = 0, **shape: object) -> Engine:
    target = make(seed, **shape)
    return Engine(target, tokenizer, draft=make_draft(kind, target), draft_tokens=k)


def plain(engine: Engine) -> Engine:
    return Engine(engine.model, engine.tokenizer)


def tokens(engine: Engine, ids: Sequence[int], params: SamplingParams, stream: int = 0) -> list[Token]:
    return list(engine.tokens([ids], params, [stream]))


def ids_of(engine: Engine, ids: Sequence[int], params: SamplingParams, stream: int = 0) -> list[int]:
    return [t.id for t in tokens(engine, ids, params, stream)]


# ---- the distribution ------------------------------------------------------------------------------------------


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read everything once: thousands of short texts over a small vocabulary are soon all the same forwards."""
    read, memory = speculative._Reader.logits, dict[object, torch.Tensor]()

    def logits(reader: speculative._Reader, ids: list[int], n: int = 1) -> torch.Tensor:
        key = (reader, *ids, n)
        if key not in memory:
            memory[key] = read(reader, ids, n)
        return memory[key]

    monkeypatch.setattr(speculative._Reader, "logits", logits)


@torch.inference_mode()
def exact(engine: Engine, prompt: list[int], params: SamplingParams) -> dict[tuple[int, ...], float]:
    """The probability of every text of at most max_new_tokens, by reading each beginning without a cache."""
    processors, done, begun = engine.processors(params), dict[tuple[int, ...], float](), {(): 1.0}
    for _ in range(params.max_new_tokens):
        longer: dict[tuple[int, ...], float] = {}
        for text, mass in begun.items():
            row = [*prompt, *text]
            logits = engine.model(torch.tensor([row])).logits[:, -1]
            processed = processors(logits, History([row], [len(prompt)]))
            for token, p in enumerate(processed.softmax(-1)[0].tolist()):
                (done if token in processors.ends else longer)[(*text, token)] = mass * p
        begun = longer
    return done | begun


def p_value(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """Of Pearson's chi-square test, rare outcomes taken together."""
    total = counts.total()
    assert all(expected[text] > 0 for text in counts), "a text that cannot be"
    cells = [(counts[text], total * p) for text, p in expected.items() if total * p >= 5]
    rare = [(counts[text], total * p) for text, p in expected.items() if 0 < total * p < 5]
    if rare:
        cells.append((sum(n for n, _ in rare), max(1.0, sum(m for _, m in rare))))
    statistic = sum((n - mean) ** 2 / mean for n, mean in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(*half).item()


@pytest.mark.usefixtures("remembered")
@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize(
    ("options", "k"),
    [
        ({}, 1),
        ({}, 3),
        ({"temperature": 0.6}, 2),
        ({"temperature": 1.7, "top_k": 2}, 2),
        ({"top_p": 0.9}, 2),
        ({"repetition_penalty": 2.0, "frequency_penalty": 0.5}, 2),
        ({"no_repeat_ngram": 2, "logit_bias": {"b": 1.0}, "min_new_tokens": 2, "min_p": 0.05}, 4),
    ],
)
def test_texts_are_as_likely_as_without_a_draft(kind: str, options: dict, k: int) -> None:
    """The joint distribution of three tokens over abc and end-of-text, against all their exact probabilities."""
    tokenizer = char_tokenizer(["abc"])
    engine = make_pair(kind, tokenizer, k, seed=5, vocab_size=4, n_layer=1, init_std=0.3)
    params, prompt = SamplingParams(max_new_tokens=3, seed=1, **options), [0, 2]
    texts: dict[object, tuple[int, ...]] = {}
    for token in engine.tokens([prompt] * 2000, params, logprobs=False):
        texts[token.key] = (*texts.get(token.key, ()), token.id)
    expected = exact(engine, prompt, params)
    assert sum(2000 * p > 5 for p in expected.values()) >= 4
    assert math.isclose(sum(expected.values()), 1.0, abs_tol=1e-5)
    assert p_value(Counter(texts.values()), expected) > 1e-3


def test_what_takes_a_rejected_tokens_place() -> None:
    p, q = torch.tensor([0.5, 0.2, 0.3]), torch.tensor([0.2, 0.7, 0.1])
    torch.testing.assert_close(residual(p, q), torch.tensor([0.3, 0.0, 0.2]))
    # Leviathan et al., appendix A.1: accepted or replaced, each token comes with probability p
    accepted = torch.minimum(p, q)
    torch.testing.assert_close(accepted + (1 - accepted.sum()) * residual(p, q) / residual(p, q).sum(), p)
    smaller = p - 1e-7
    assert torch.equal(residual(smaller, p), smaller)


# ---- the same texts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6])
def test_greedy_text_is_plain_greedy_text(kind: str, k: int) -> None:
    """Over random models, prompts and lengths, with an end-of-text that comes early, late or never."""
    rng, ends = random.Random(k), Counter[str]()
    for seed in range(4):
        engine = make_pair(kind, byte_tokenizer(), k, seed, vocab_size=257, n_layer=1)
        bias = {"256": 2.0 * seed}
        for _ in range(3):
            n = rng.randrange(1, 20)
            params = SamplingParams(max_new_tokens=n, temperature=0.0, repetition_penalty=1.3, logit_bias=bias)
            prompt = [rng.randrange(256) for _ in range(rng.randrange(1, 30))]
            expected, got = tokens(plain(engine), prompt, params), tokens(engine, prompt, params)
            assert [(t.id, t.finish_reason) for t in got] == [(t.id, t.finish_reason) for t in expected]
            ends[got[-1].finish_reason or ""] += 1
    assert ends["eos"]
    assert ends["length"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("n", [1, 2, 5, 6, 11])
def test_an_end_amid_proposals(n: int, temperature: float) -> None:
    """By length, and by end-of-text, after which nothing is proposed."""
    engine = make_pair("same", byte_tokenizer(), k=5, vocab_size=257)
    params = SamplingParams(max_new_tokens=n, temperature=temperature, ignore_eos=True)
    cut = tokens(engine, [1, 2], params)
    assert [t.finish_reason for t in cut] == [None] * (n - 1) + ["length"]
    assert cut[-1].draft == (n, n)
    ending = replace(params, max_new_tokens=40, min_new_tokens=n - 1, ignore_eos=False, logit_bias={"256": 100.0})
    ended = tokens(engine, [1, 2], ending)
    assert [t.finish_reason for t in ended] == [None] * (n - 1) + ["eos"]
    assert ended[-1].draft == (n, n)


@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "top_p": 0.9}, {"presence_penalty": 1.0}])
def test_the_text_does_not_depend_on_how_many_are_proposed(kind: str, options: dict) -> None:
    params = SamplingParams(max_new_tokens=25, seed=4, **options)
    texts = [ids_of(make_pair(kind, k=k), [3, 1, 4], params) for k in range(1, 7)]
    assert all(text == texts[0] for text in texts)


def test_seed_and_stream_alone_decide() -> None:
    engine, params = make_pair("good"), SamplingParams(max_new_tokens=12, seed=7)
    prompts = [[1, 2, 3], [1, 2, 3, 4], [9], [1, 2, 3]]
    together: dict[object, list[int]] = {i: [] for i in range(4)}
    for token in engine.tokens(prompts, params):
        together[token.key].append(token.id)
    for i, prompt in enumerate(prompts):
        assert together[i] == ids_of(engine, prompt, params, stream=i)
    assert together[0] != together[3]
    assert together[0] != ids_of(engine, prompts[0], replace(params, seed=8))


# ---- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["good", "bad"])
def test_what_was_turned_down_leaves_no_trace(shape: dict, kind: str) -> None:
    """Each log-probability is that of a forward without a cache, after many proposals turned down."""
    engine, row = make_pair(kind, **shape), [5, 6, 7]
    got = tokens(engine, row, SamplingParams(max_new_tokens=40, seed=2))
    assert got[-1].draft is not None
    assert got[-1].draft.proposed - got[-1].draft.accepted > 10
    for token in got:
        logits = engine.model(torch.tensor([row])).logits[0, -1]
        assert token.logprob == pytest.approx(logits.log_softmax(-1)[token.id].item(), abs=1e-5)
        row.append(token.id)


@pytest.mark.parametrize("shape", [{}, {"attention_pattern": "alternating", "band_width": 4}])
@pytest.mark.parametrize(("target_context", "draft_context"), [(12, 12), (12, 40), (40, 12), (12, 7), (1, 1)])
def test_views_slide_as_without_a_draft(shape: dict, target_context: int, draft_context: int) -> None:
    """Each model by its own context: greedy texts stay the same, drawn ones are judged by the target's view."""
    target, draft = make(0, context_length=target_context, **shape), make(1, context_length=draft_context, **shape)
    engine = Engine(target, draft=draft, draft_tokens=5)
    for prompt in ([1, 2, 3], list(range(11)), list(range(30))):
        greedy = SamplingParams(max_new_tokens=20, temperature=0.0)
        assert ids_of(engine, prompt, greedy) == ids_of(plain(engine), prompt, greedy)
        row = list(prompt)
        for token in tokens(engine, prompt, SamplingParams(max_new_tokens=20, seed=3)):
            view = row[window_start(len(row), target_context) :]
            logits = target(torch.tensor([view])).logits[0, -1]
            assert token.logprob == pytest.approx(logits.log_softmax(-1)[token.id].item(), abs=1e-5)
            row.append(token.id)


def test_a_draft_that_always_slides_is_still_exact_about_its_own_view() -> None:
    """q must be what a proposal was drawn from: a draft equal to the target, context included, is never refused."""
    engine = make_pair("same", context_length=12)
    last = tokens(engine, [1, 2, 3], SamplingParams(max_new_tokens=40, seed=1))[-1]
    assert last.draft == (40, 40)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_an_identical_draft_is_always_accepted_and_saves_forwards(k: int) -> None:
    target = make(0)
    engine, read = Engine(target, draft=make_draft("good", target), draft_tokens=k), list[int]()
    assert engine.draft is not None
    engine.draft.load_state_dict(target.state_dict())
    target.register_forward_pre_hook(lambda _, args: read.append(args[0].numel()))
    params = SamplingParams(max_new_tokens=24, seed=5, temperature=0.8, top_k=20)
    last = tokens(engine, [1, 2, 3, 4], params)[-1]
    assert last.draft == (24, 24)
    assert read == [3, *[k + 1] * (24 // (k + 1))]  # the prompt, then a round's tokens at once


def test_samples_of_one_prompt_read_it_once() -> None:
    engine, read = make_pair("good"), list[int]()
    engine.model.register_forward_pre_hook(lambda _, args: read.append(args[0].numel()))
    list(engine.tokens([list(range(30))] * 3, SamplingParams(max_new_tokens=2)))
    assert read.count(29) == 1
    assert sum(read) < 29 + 3 * 2 * 3


# ---- texts -------------------------------------------------------------------------------------------------------


def test_a_stop_string_ends_one_text_and_the_next_goes_on() -> None:
    engine = make_pair("good", byte_tokenizer(), vocab_size=257, init_std=0.2)
    params, prompts = SamplingParams(max_new_tokens=30, seed=2, ignore_eos=True), ["a", "def main(", "x = "]
    free = engine.generate(prompts, params)
    stop = free[1].text[6:9]
    for got, whole in zip(engine.generate(prompts, replace(params, stop=[stop])), free, strict=True):
        if stop in whole.text:
            assert (got.text, got.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
        else:
            assert (got.text, got.finish_reason) == (whole.text, "length")
        assert got.ids == whole.ids[: len(got.ids)]


def test_a_request_is_cancelled_waiting_or_under_way() -> None:
    engine, params = make_pair("good"), SamplingParams(max_new_tokens=8, seed=1)
    scheduler = engine.scheduler(max_rows=1)
    assert isinstance(scheduler, SpeculativeScheduler)
    assert scheduler.step() == []
    for i in range(3):
        scheduler.add(Request(i, [i, 1], params, i), engine.processors(params))
    first = [token for _ in range(3) for token in scheduler.step()]
    scheduler.cancel(0)
    scheduler.cancel(1)
    rest = [token for _ in range(8) for token in scheduler.step()]
    assert [t.id for t in first] == ids_of(engine, [0, 1], params, 0)[:3]
    assert [t.id for t in rest] == ids_of(engine, [2, 1], params, 2)
    assert {t.key for t in rest} == {2}
    assert not scheduler.busy


def test_counts_come_with_the_text() -> None:
    engine = make_pair("good", byte_tokenizer(), vocab_size=257)
    done = engine.generate(["abc"], SamplingParams(max_new_tokens=20, seed=2))[0]
    assert done.draft is not None
    assert 0 < done.draft.accepted <= min(20, done.draft.proposed)
    assert plain(engine).generate(["abc"], SamplingParams(max_new_tokens=3))[0].draft is None


# ---- mistakes ----------------------------------------------------------------------------------------------------


def test_a_draft_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match="the draft has 60 tokens and the model 50"):
        Engine(make(0), draft=make(0, vocab_size=60))


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"best_of": 2}])
def test_a_draft_neither_searches_nor_ranks(options: dict) -> None:
    engine = make_pair("good", byte_tokenizer(), vocab_size=257)
    with pytest.raises(UserError, match="a draft speeds up one text"):
        complete(engine, ["a"], SamplingParams(**options))


def test_overflow_is_refused_by_the_targets_context_alone() -> None:
    target = make(0, context_length=16)
    engine = Engine(target, draft=make(1, context_length=4))
    refuse = SamplingParams(max_new_tokens=10, on_overflow="refuse")
    assert len(ids_of(engine, [1] * 6, refuse)) == 10
    with pytest.raises(UserError, match="7 tokens and max_new_tokens 10 exceed the context of 16"):
        ids_of(engine, [1] * 7, refuse)

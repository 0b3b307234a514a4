"""Continuous batching: rows join, leave, share beginnings and slide, and never notice one another."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest
import torch

from gptcli.config.schema import ModelConfig, SamplingParams
from gptcli.errors import UserError
from gptcli.generate import Engine
from gptcli.generate.scheduler import SHARED_PREFIX, Request, Scheduler
from gptcli.model import GPT

PARAMS = SamplingParams(max_new_tokens=12, temperature=0.9, top_k=20, seed=5)


def make(**shape: object) -> GPT:
    base = {"n_layer": 2, "n_head": 2, "n_embd": 16, "context_length": 40, "vocab_size": 50, "init_std": 0.4}
    model = GPT(ModelConfig(**{**base, **shape}))  # type: ignore[arg-type]
    model.init_weights(0)
    return model.eval()


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(50) for _ in range(rng.randrange(1, 25))] for _ in range(count)]


def run(scheduler: Scheduler) -> dict[object, list[int]]:
    out: dict[object, list[int]] = defaultdict(list)
    while scheduler.busy:
        for token in scheduler.step():
            out[token.key].append(token.id)
    return out


def alone(model: GPT, ids: list[int], params: SamplingParams, stream: int) -> list[int]:
    return [t.id for t in Engine(model).tokens([ids], params, [stream])]


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "n_kv_head": 1, "bias": False},
        {"position": "alibi"},
        {"attention_pattern": "alternating", "band_width": 4},
    ],
)
@pytest.mark.parametrize("max_rows", [1, 3, 64])
def test_rows_are_what_they_are_alone(shape: dict[str, object], max_rows: int) -> None:
    model, given = make(**shape), prompts(9)
    got = Engine(model).tokens(given, PARAMS, max_rows=max_rows)
    rows: dict[object, list[int]] = defaultdict(list)
    for token in got:
        rows[token.key].append(token.id)
    assert [rows[i] for i in range(9)] == [alone(model, ids, PARAMS, i) for i, ids in enumerate(given)]


def test_requests_join_leave_and_are_cancelled_at_any_time() -> None:
    model, given, rng = make(), prompts(30, seed=3), random.Random(1)
    engine = Engine(model)
    scheduler = Scheduler(model, max_rows=4)
    params = [SamplingParams(max_new_tokens=rng.randrange(1, 30), temperature=t, seed=2) for t in (0.0, 0.7, 1.3)]
    out: dict[object, list[int]] = defaultdict(list)
    cancelled: set[int] = set()
    waiting = list(range(30))
    while waiting or scheduler.busy:
        for _ in range(min(len(waiting), rng.randrange(3))):
            i = waiting.pop(0)
            scheduler.add(Request(i, given[i], params[i % 3], i), engine.processors(params[i % 3]))
        if rng.random() < 0.15 and out:
            victim = rng.randrange(30)
            scheduler.cancel(victim)
            cancelled.add(victim)
        for token in scheduler.step():
            out[token.key].append(token.id)
    for i in range(30):
        full = alone(model, given[i], params[i % 3], i)
        assert out[i] == full[: len(out[i])]
        assert len(out[i]) == len(full) or i in cancelled


def test_a_shared_beginning_is_read_once() -> None:
    model = make(context_length=200)
    read: list[int] = []
    model.register_forward_pre_hook(lambda _, args: read.append(args[0].numel()))
    common = [i % 50 for i in range(100)]
    given = [[*common, i] for i in range(8)]
    params = SamplingParams(max_new_tokens=1, temperature=0.0)
    by_torch = Engine(model)
    by_torch._decode = None
    rows = {t.key: t.id for t in by_torch.tokens(given, params)}
    assert sum(read) == 101 + 7
    read.clear()
    # and again when one joins later
    engine, scheduler = Engine(model), Scheduler(model, max_rows=8)
    longer = SamplingParams(max_new_tokens=5, temperature=0.0)
    scheduler.add(Request(0, given[0], longer), engine.processors(longer))
    scheduler.step()
    scheduler.add(Request(1, given[1], longer), engine.processors(longer))
    scheduler.step()
    assert read[1:] == [1, 1]
    assert rows == {i: alone(model, ids, params, i)[0] for i, ids in enumerate(given)}
    assert len(common) > SHARED_PREFIX


def test_samples_of_one_prompt_differ_by_their_streams_alone() -> None:
    model, prompt = make(), list(range(30))
    rows: dict[object, list[int]] = defaultdict(list)
    for token in Engine(model).tokens([prompt] * 6, PARAMS):
        rows[token.key].append(token.id)
    assert len({tuple(r) for r in rows.values()}) > 1
    assert [rows[i] for i in range(6)] == [alone(model, prompt, PARAMS, i) for i in range(6)]


def test_rows_that_slide_beside_rows_that_do_not() -> None:
    model = make(context_length=16)
    params = SamplingParams(max_new_tokens=30, temperature=0.8, seed=1)
    given = [[1, 2, 3], list(range(14)), list(range(40)), [7]]
    rows: dict[object, list[int]] = defaultdict(list)
    for token in Engine(model).tokens(given, params):
        rows[token.key].append(token.id)
    assert [rows[i] for i in range(4)] == [alone(model, ids, params, i) for i, ids in enumerate(given)]


def test_overflow_is_refused_on_request() -> None:
    model = make(context_length=16)
    refuse = SamplingParams(max_new_tokens=10, on_overflow="refuse")
    assert len(list(Engine(model).tokens([[1] * 6], refuse))) <= 10
    with pytest.raises(UserError, match="7 tokens and max_new_tokens 10 exceed the context of 16"):
        list(Engine(model).tokens([[1] * 7], refuse))


def test_different_params_run_side_by_side() -> None:
    model, engine = make(), Engine(make())
    several = [
        SamplingParams(max_new_tokens=10, temperature=0.0),
        SamplingParams(max_new_tokens=7, temperature=1.5, seed=3, repetition_penalty=1.4),
        SamplingParams(max_new_tokens=12, top_p=0.7, seed=4, no_repeat_ngram=2),
    ]
    scheduler = Scheduler(model, max_rows=8)
    given = prompts(6, seed=8)
    made = [engine.processors(p) for p in several]
    for i, ids in enumerate(given):
        scheduler.add(Request(i, ids, several[i % 3], i), made[i % 3])
    out = run(scheduler)
    for i, ids in enumerate(given):
        assert out[i] == alone(model, ids, several[i % 3], i)


def test_logprobs_are_the_models_own() -> None:
    model = make()
    ids = [1, 2, 3]
    for token in Engine(model).tokens([ids], PARAMS):
        expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token.id].item()
        assert token.logprob == pytest.approx(expected, abs=1e-5)
        ids = [*ids, token.id]

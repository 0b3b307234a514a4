"""Best of several drawn texts, by log-probability or by a function; the one way in to all kinds of generation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from gptcli.config.schema import ModelConfig, SamplingParams
from gptcli.errors import UserError
from gptcli.generate import Engine, complete
from gptcli.generate.completions import logprob_score
from gptcli.generate.engine import Completion
from gptcli.model import GPT
from gptcli.tokenizer.build import byte_tokenizer

PROMPTS = ["a", "def main(", "once"]
PARAMS = SamplingParams(max_new_tokens=10, seed=3, best_of=5, logit_bias={"<|endoftext|>": 2.0})


@pytest.fixture(scope="module")
def engine() -> Engine:
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=64, vocab_size=257, init_std=0.2))
    model.init_weights(3)
    return Engine(model.eval(), byte_tokenizer())


def all_drawn(engine: Engine, prompt: str, stream: int, params: SamplingParams = PARAMS) -> list[Completion]:
    plain = dataclasses.replace(params, best_of=None, num_return=1)
    n = params.best_of or 1
    return engine.generate([prompt] * n, plain, [stream * n + i for i in range(n)])


@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_the_best_by_log_probability_comes_back(engine: Engine, kind: str) -> None:
    params = dataclasses.replace(PARAMS, best_of_score=kind)
    for number, best in enumerate(complete(engine, PROMPTS, params)):
        drawn = all_drawn(engine, PROMPTS[number], number)
        scores = [logprob_score(c, kind) for c in drawn]
        assert best.score == pytest.approx(max(scores), abs=1e-4)
        assert best.ids == drawn[scores.index(max(scores))].ids
        assert len({tuple(c.ids) for c in drawn}) > 2


def test_a_score_counts_the_end_of_text() -> None:
    ended = Completion("", ids=[1, 2], logprobs=[-1.0, -2.0], eos_logprob=-6.0)
    assert (logprob_score(ended, "sum"), logprob_score(ended, "mean")) == (-9.0, -3.0)
    cut = Completion("", ids=[1, 2], logprobs=[-1.0, -2.0])
    assert (logprob_score(cut, "sum"), logprob_score(cut, "mean")) == (-3.0, -1.5)
    assert logprob_score(Completion("", eos_logprob=-0.5), "mean") == -0.5


def test_a_function_may_choose(engine: Engine) -> None:
    asked: list[tuple[str, str]] = []

    def longest(prompts: list[str], texts: list[str]) -> list[int]:
        asked.extend(zip(prompts, texts, strict=True))
        return [len(text) for text in texts]

    best = complete(engine, PROMPTS, PARAMS, scorer=longest)
    assert [p for p, _ in asked] == [p for p in PROMPTS for _ in range(5)]
    for number, c in enumerate(best):
        texts = [text for _, text in asked[5 * number : 5 * number + 5]]
        assert len(c.text) == c.score == max(map(len, texts))


@pytest.mark.parametrize("scores", [[1.0], [math.nan] * 15])
def test_a_function_must_give_a_number_for_each(engine: Engine, scores: list[float]) -> None:
    with pytest.raises(UserError, match="a number for each of 15 texts"):
        complete(engine, PROMPTS, PARAMS, scorer=lambda prompts, texts: scores)
    with pytest.raises(UserError, match="best_of, which is not set"):
        complete(engine, PROMPTS, SamplingParams(), scorer=lambda prompts, texts: scores)


def test_several_best_come_in_order_and_batches_change_nothing(engine: Engine) -> None:
    params = dataclasses.replace(PARAMS, num_return=3)
    together = complete(engine, PROMPTS, params)
    assert [c.prompt for c in together] == [p for p in PROMPTS for _ in range(3)]
    for i, prompt in enumerate(PROMPTS):
        of_prompt = together[3 * i : 3 * i + 3]
        scores = [c.score or 0.0 for c in of_prompt]
        assert scores == sorted(scores, reverse=True)
        alone = complete(engine, [prompt], params, streams=[i])
        assert [(c.ids, c.text) for c in alone] == [(c.ids, c.text) for c in of_prompt]


def test_without_beams_or_best_of_it_is_the_engine(engine: Engine) -> None:
    params = SamplingParams(max_new_tokens=5, seed=2)
    assert complete(engine, PROMPTS, params) == engine.generate(PROMPTS, params)


def test_the_engine_itself_refuses_what_it_does_not_do(engine: Engine) -> None:
    options: dict[str, Any]
    for options in ({"num_beams": 2}, {"best_of": 2}):
        with pytest.raises(AssertionError):
            engine.generate(["a"], SamplingParams(**options))


def test_an_empty_text_has_a_score() -> None:
    assert logprob_score(Completion(""), "mean") == logprob_score(Completion(""), "sum") == 0

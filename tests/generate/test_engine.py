"""The engine: batches equal single rows, caches equal none, stops are clean, the view slides as stated."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gptcli.config.schema import ModelConfig, SamplingParams
from gptcli.errors import UserError
from gptcli.generate import Engine
from gptcli.generate.scheduler import window_start
from gptcli.generate.text import TextStream
from gptcli.model import GPT
from gptcli.tokenizer.build import byte_tokenizer


def make_engine(context_length: int = 64, **changes: object) -> Engine:
    config = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "vocab_size": 257,
        "init_std": 0.2,
        "context_length": context_length,
    }
    model = GPT(ModelConfig(**{**config, **changes}))
    model.init_weights(3)
    return Engine(model.eval(), byte_tokenizer())


PROMPTS = ["a", "def main(", "once upon a time", "x = "]


CONSTRAINTS = {
    "repetition_penalty": 1.4,
    "presence_penalty": 0.7,
    "frequency_penalty": 0.3,
    "no_repeat_ngram": 2,
    "bad_words": ["e", "an"],
    "logit_bias": {"a": 3.0, " ": 2.0},
}
FILTERS = {"top_k": 60, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.9}


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("options", [FILTERS, *({k: v} for k, v in CONSTRAINTS.items()), CONSTRAINTS | FILTERS])
def test_a_batch_gives_each_row_what_it_gets_alone(temperature: float, options: dict) -> None:
    engine = make_engine()
    params = SamplingParams(max_new_tokens=20, temperature=temperature, seed=5, ignore_eos=True, **options)
    together = engine.generate(PROMPTS, params)
    for i, prompt in enumerate(PROMPTS):
        alone = engine.generate([prompt], params, streams=[i])[0]
        assert alone.ids == together[i].ids
        assert alone.text == together[i].text
    backwards = engine.generate(PROMPTS[::-1], params, streams=[3, 2, 1, 0])
    assert [c.ids for c in backwards[::-1]] == [c.ids for c in together]


@pytest.mark.parametrize("shape", [{}, {"attention_pattern": "alternating", "band_width": 4}, {"position": "rope"}])
def test_sliding_views_equal_recomputation(shape: dict) -> None:
    """Three contexts' worth of tokens: each must be what the model says of the stated view, with no cache."""
    engine = make_engine(context_length=12, **shape)
    prompts = [[5, 6, 7], [1] * 9, list(range(20))]
    params = SamplingParams(max_new_tokens=30, temperature=0.0, ignore_eos=True)
    rows: list[list[int]] = [list(p) for p in prompts]
    for token in engine.tokens(prompts, params):
        ids = rows[token.key]
        view = torch.tensor([ids[window_start(len(ids), 12) :]])
        assert view.shape[1] <= 12
        logits = engine.model(view).logits[0, -1]
        assert token.id == int(logits.argmax())
        assert token.logprob == pytest.approx(logits.log_softmax(-1)[token.id].item(), abs=1e-4)
        ids.append(token.id)
    assert [len(r) for r in rows] == [33, 39, 50]


def test_window_start_keeps_more_than_half_a_context() -> None:
    for n in range(1, 100):
        view = n - window_start(n, 10)
        assert view == n if n <= 10 else 5 < view <= 10


def test_eos_ends_a_row_and_is_not_part_of_the_text() -> None:
    engine = make_engine()
    with torch.no_grad():  # whatever it reads, it says end-of-text
        engine.model.ln_f.weight.zero_()
        engine.model.ln_f.bias.copy_(engine.model.wte.weight[256] * 100)
    done = engine.generate(["abc"], SamplingParams(max_new_tokens=9, temperature=0.0))[0]
    assert (done.text, done.ids, done.finish_reason) == ("", [], "eos")
    on = engine.generate(["abc"], SamplingParams(max_new_tokens=9, temperature=0.0, ignore_eos=True))[0]
    assert (len(on.ids), on.finish_reason) == (9, "length")


def test_rows_that_end_leave_the_others_their_history() -> None:
    """Rows end at their own times, so those left must keep counts and n-grams of their own."""
    engine = make_engine()
    constraints = {"presence_penalty": 1.0, "no_repeat_ngram": 1, "min_new_tokens": 3, "repetition_penalty": 1.2}
    params = SamplingParams(max_new_tokens=40, seed=3, logit_bias={"<|endoftext|>": 3.0}, **constraints)
    together = engine.generate(PROMPTS, params)
    assert len({len(c.ids) for c in together}) > 2
    assert all(len(c.ids) >= 3 for c in together)
    for i, prompt in enumerate(PROMPTS):
        assert engine.generate([prompt], params, streams=[i])[0].ids == together[i].ids


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_ngram_comes_twice_the_prompt_included(n: int) -> None:
    engine = make_engine()
    params = SamplingParams(max_new_tokens=100, temperature=0.3, top_k=12, ignore_eos=True, no_repeat_ngram=n)
    prompt = list(b"abc cab")
    row = list(prompt)
    for token in engine.tokens([prompt], params):
        runs = {tuple(row[i : i + n]) for i in range(len(row) - n + 1)}
        row.append(token.id)
        assert tuple(row[-n:]) not in runs
    free = [t.id for t in engine.tokens([prompt], dataclasses.replace(params, no_repeat_ngram=0))]
    assert len({tuple(free[i : i + n]) for i in range(100 - n + 1)}) < 100 - n + 1


def test_end_of_text_waits_for_the_least_length() -> None:
    engine = make_engine()
    params = SamplingParams(max_new_tokens=9, min_new_tokens=4, logit_bias={"256": 100.0})
    assert [(len(c.ids), c.finish_reason) for c in engine.generate(PROMPTS, params)] == [(4, "eos")] * 4


def test_bad_words_never_come() -> None:
    engine = make_engine()
    likely = {"a": 12.0, "b": 12.0, "c": 12.0}
    params = SamplingParams(max_new_tokens=200, seed=1, ignore_eos=True, logit_bias=likely)
    free = engine.generate(PROMPTS, params)
    assert any("ab" in c.text and "cca" in c.text for c in free)
    held = engine.generate(PROMPTS, dataclasses.replace(params, bad_words=["ab", "cca"]))
    assert not any("ab" in c.text or "cca" in c.text for c in held)
    assert engine.generate(["xa"], dataclasses.replace(params, bad_words=["ab"]))[0].text[0] != "b"


def test_penalties_spread_what_is_generated() -> None:
    engine = make_engine()
    likely = {chr(c): 6.0 for c in range(97, 123)}
    plain = SamplingParams(max_new_tokens=60, seed=1, ignore_eos=True, logit_bias=likely, temperature=0.5)
    free, spread = (
        sum(len(set(c.ids)) for c in engine.generate(PROMPTS, dataclasses.replace(plain, frequency_penalty=x)))
        for x in (0.0, 2.0)
    )
    assert spread > free


def test_a_stop_string_is_cut_off_and_ends_only_its_row() -> None:
    engine = make_engine()
    params = SamplingParams(max_new_tokens=40, seed=2, ignore_eos=True)
    free = engine.generate(PROMPTS, params)
    stop = free[1].text[6:9]
    stopped = engine.generate(PROMPTS, dataclasses.replace(params, stop=[stop]))
    for a, b in zip(free, stopped, strict=True):
        if stop in a.text:
            assert b.text == a.text[: a.text.index(stop)]
            assert b.finish_reason == "stop"
        else:
            assert (b.text, b.finish_reason) == (a.text, "length")
    assert stopped[1].finish_reason == "stop"


def test_streamed_chunks_join_to_the_text() -> None:
    engine = make_engine()
    params = SamplingParams(max_new_tokens=60, seed=4, stop=["zz", "\n\n"], ignore_eos=True)
    chunks: dict[int, str] = {}
    final = {}
    for row, chunk, completion in engine.stream(PROMPTS, params):
        chunks[row] = chunks.get(row, "") + chunk
        if completion:
            final[row] = completion.text
    assert chunks == final


def test_an_empty_prompt_begins_a_document() -> None:
    engine = make_engine()
    assert engine.encode_prompt("") == [256]
    engine.tokenizer.special.clear()
    with pytest.raises(UserError, match="prompt is empty"):
        engine.encode_prompt("")


@pytest.mark.parametrize(
    ("pieces", "stop", "text", "stopped"),
    [
        (["st", "op"], ["stop"], "", True),
        (["a st", "opera"], ["stop"], "a ", True),
        (["best", "ow"], ["stop"], "bestow", False),
        (["sto"], ["stop"], "sto", False),
        (["aab"], ["ab"], "a", True),
        (["x", "end", "y"], ["nd", "end"], "x", True),
    ],
)
def test_stop_strings_across_tokens(pieces: list[str], stop: list[str], text: str, stopped: bool) -> None:
    stream = TextStream(byte_tokenizer(), stop)
    out = ""
    for piece in pieces:
        for byte in piece.encode():
            out += stream.push(byte)
            assert not any(s in out for s in stop)
    out += stream.flush()
    assert (out, stream.text, stream.stopped) == (text, text, stopped)

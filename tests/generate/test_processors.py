"""All processors together: their order, transformers' chain, rows apart, texts that become ids."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch

from gptcli.config.schema import SamplingParams
from gptcli.errors import UserError
from gptcli.generate.penalties import History
from gptcli.generate.processors import Processors
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.build import byte_tokenizer, char_tokenizer, train_bpe

V, EOS = 30, 29
EVERYTHING = {
    "min_new_tokens": 6,
    "temperature": 0.7,
    "top_k": 12,
    "top_p": 0.95,
    "min_p": 0.01,
    "typical_p": 0.9,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.2,
    "no_repeat_ngram": 2,
    "logit_bias": {"3": 1.5, "8": -2.0},
}


def processors(**options: Any) -> Processors:
    tokenizer: Any = SimpleNamespace(eos_id=EOS, chat_template=None)
    return Processors(SamplingParams(**options), V, tokenizer)


def kept(logits: torch.Tensor) -> list[int]:
    return (logits[0] > -math.inf).nonzero()[:, 0].tolist()


# ---- order ------------------------------------------------------------------------------------------------------


LOGITS = torch.tensor([[2.0, 1.5, 1.0, 0.5, 0.0, -0.5]])  # probabilities .41 .25 .15 .09 .06 .03
NO = -math.inf


@pytest.mark.parametrize(
    ("first", "second", "pinned", "swapped"),
    [
        # token 3 stands in the prompt, 0 1 2 were generated; token 0: (2 + 2) / 2, not 2 / 2 + 2
        (
            {"logit_bias": {"0": 2.0}},
            {"repetition_penalty": 2.0},
            [2.0, 0.75, 0.5, 0.25, 0.0, -0.5],
            [3.0, 0.75, 0.5, 0.25, 0.0, -0.5],
        ),
        # token 0, generated once: 2 / 2 - 1, not (2 - 1) / 2
        (
            {"repetition_penalty": 2.0},
            {"presence_penalty": 1.0},
            [0.0, -0.25, -0.5, 0.25, 0.0, -0.5],
            [0.5, 0.25, 0.0, 0.25, 0.0, -0.5],
        ),
        # of what is not banned the likeliest two; else the likeliest two are banned, so that the bans give way
        ({"no_repeat_ngram": 1}, {"top_k": 2}, [NO, NO, NO, NO, 0.0, -0.5], [2.0, 1.5, NO, NO, NO, NO]),
        # at a temperature of 2 the first token has less than .4
        ({"temperature": 2.0}, {"top_p": 0.4}, [1.0, 0.75, NO, NO, NO, NO], [1.0, NO, NO, NO, NO, NO]),
        # of two tokens the first has .62
        ({"top_k": 2}, {"top_p": 0.6}, [2.0, NO, NO, NO, NO, NO], [2.0, 1.5, NO, NO, NO, NO]),
        ({"top_p": 0.6}, {"min_p": 0.5}, [2.0, 1.5, NO, NO, NO, NO], [2.0, NO, NO, NO, NO, NO]),
        # of three tokens the second is the nearest to their entropy and has .31
        ({"min_p": 0.3}, {"typical_p": 0.3}, [NO, 1.5, NO, NO, NO, NO], [NO, 1.5, 1.0, NO, NO, NO]),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_the_order_is_pinned(first: dict, second: dict, pinned: list[float], swapped: list[float]) -> None:
    """Those neighbours that do not commute; each pair alone, and the two by hand in the wrong order."""

    def run(logits: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        return Processors(SamplingParams(**options), 6)(logits, History([[3, 0, 1, 2]], [1]))

    torch.testing.assert_close(run(LOGITS, first | second), torch.tensor([pinned]))
    torch.testing.assert_close(run(run(LOGITS, second), first), torch.tensor([swapped]))


# ---- against transformers -----------------------------------------------------------------------------------------


def transformers_chain(options: dict[str, Any], prompt: int) -> Any:
    transformers = pytest.importorskip("transformers")
    from transformers.generation import logits_process as hf

    makers = {
        "logit_bias": lambda v: hf.SequenceBiasLogitsProcessor([[[int(k)], x] for k, x in v.items()]),
        "repetition_penalty": hf.RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram": hf.NoRepeatNGramLogitsProcessor,
        "min_new_tokens": lambda v: hf.MinNewTokensLengthLogitsProcessor(prompt, v, EOS),
        "temperature": hf.TemperatureLogitsWarper,
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
        "typical_p": hf.TypicalLogitsWarper,
    }
    return transformers.LogitsProcessorList(make(options[name]) for name, make in makers.items() if name in options)


@pytest.mark.parametrize("option", [{k: v} for k, v in EVERYTHING.items() if "presence" not in k and "freq" not in k])
def test_each_processor_equals_transformers(option: dict[str, Any]) -> None:
    check_against_transformers(option, seed=0)


@pytest.mark.parametrize("seed", range(40))
def test_any_subset_equals_transformers_chain(seed: int) -> None:
    shuffled = random.Random(seed)
    names = [n for n in EVERYTHING if n not in ("presence_penalty", "frequency_penalty")]
    check_against_transformers({n: EVERYTHING[n] for n in names if shuffled.random() < 0.6}, seed)


def check_against_transformers(options: dict[str, Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(16, V, generator=generator) * 3
    ids = torch.randint(0, V, (16, 20), generator=generator)
    for prompt in (12, 16):  # 8 and 4 new tokens: past the least number, and before it
        expected = transformers_chain(options, prompt)(ids, logits.clone())
        got = processors(**options)(logits, History(ids.tolist(), [prompt] * 16))
        torch.testing.assert_close(got, expected)


# ---- rows ---------------------------------------------------------------------------------------------------------


def test_a_row_gets_what_it_gets_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    lengths = [3, 17, 1, 9, 30]
    rows = [torch.randint(0, V, (n,), generator=generator).tolist() for n in lengths]
    prompts = [1, 5, 1, 8, 20]
    logits = torch.randn(5, V, generator=generator)
    process = processors(**EVERYTHING)
    together = process(logits, History(rows, prompts))
    for i in range(5):
        assert torch.equal(process(logits[i : i + 1], History([rows[i]], [prompts[i]]))[0], together[i])


def test_what_is_off_needs_no_history_and_changes_nothing() -> None:
    logits = torch.randn(2, V)
    for options in ({}, {"top_p": 1.0, "typical_p": 1.0, "min_p": 0.0, "top_k": V}, {"temperature": 0.0, "top_k": 1}):
        process = processors(**options)
        assert not process.needs_history
        assert torch.equal(process(logits, None), logits)
    needing = [n for n in EVERYTHING if processors(**{n: EVERYTHING[n]}).needs_history]
    assert needing == [
        "min_new_tokens", "repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram",
    ]  # fmt: skip


def test_end_of_text_is_masked_before_the_least_number_of_new_tokens() -> None:
    process, logits = processors(min_new_tokens=2), torch.zeros(3, V)
    got = process(logits, History([[1] * 5, [1] * 6, [1] * 2], [4, 4, 2]))
    assert (got[:, EOS] == -math.inf).tolist() == [True, False, True]
    assert (got[:, :EOS] == 0).all()
    assert not processors(min_new_tokens=2, ignore_eos=True).needs_history


def test_bad_words_hold_where_other_bans_would_leave_nothing() -> None:
    params = SamplingParams(bad_words=["a"], no_repeat_ngram=1)
    got = Processors(params, 2, char_tokenizer("ab"))(torch.zeros(1, 2), History([[1]], [1]))
    assert kept(got) == [1]


# ---- texts to ids -------------------------------------------------------------------------------------------------


def test_a_bias_names_an_id_a_token_or_a_special_token() -> None:
    params = SamplingParams(logit_bias={"97": 1.0, "b": 2.0, "<|endoftext|>": -3.0, "a": 0.5})
    bias = Processors(params, 257, byte_tokenizer()).bias
    assert bias is not None
    assert (bias[97], bias[98], bias[256]) == (1.5, 2.0, -3.0)
    assert int((bias != 0).sum()) == 3


@pytest.mark.parametrize(
    ("options", "tokenizer", "words"),
    [
        ({"logit_bias": {"257": 1.0}}, byte_tokenizer(), "logit_bias: 257 is no token id; this vocabulary has 257"),
        ({"logit_bias": {"ab": 1.0}}, byte_tokenizer(), "logit_bias: 'ab' is 2 tokens"),
        ({"logit_bias": {"": 1.0}}, byte_tokenizer(), "logit_bias: '' is 0 tokens"),
        ({"logit_bias": {"a": 1.0}}, None, "logit_bias: 'a' is text, and this model has no tokenizer"),
        ({"bad_words": ["a"]}, None, "bad_words: these are texts, and this model has no tokenizer"),
        ({"bad_words": ["é"]}, char_tokenizer("ab"), "'é' is not in this character tokenizer's vocabulary"),
    ],
)
def test_what_names_no_token_is_refused(options: dict, tokenizer: Any, words: str) -> None:
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        Processors(SamplingParams(**options), 257, tokenizer)


def test_bad_words_are_banned_with_and_without_their_space() -> None:
    tokenizer = train_bpe(["a bad day, a bad bad cat, bad"] * 50, 280)
    for text in ("bad", "so bad"):
        ids = tokenizer.encode(text)
        process = Processors(SamplingParams(bad_words=["bad"]), tokenizer.vocab_size, tokenizer)
        got = process(torch.zeros(1, tokenizer.vocab_size), History([[0, *ids[:-1]]], [1]))
        assert got[0, ids[-1]] == -math.inf
    assert Processors(SamplingParams(bad_words=["a"]), 2, char_tokenizer("ab")).bad_words[0].tolist() == [[0]]


def test_bad_words_and_biases_of_a_tokenizer_that_puts_a_space_before_a_document() -> None:
    """As Llama's does: there "." alone is not the token that ends a sentence."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate(("▁", ".", "a", "▁a", "\n"))},
                                                         [("▁", "a")]))  # fmt: skip
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode(".") == [0, 1]
    for word, running in ((".", [2, 1]), (" a", [1, 3]), ("a", [1, 3])):
        process = Processors(SamplingParams(bad_words=[word]), tokenizer.vocab_size, tokenizer)
        got = process(torch.zeros(1, tokenizer.vocab_size), History([running[:-1]], [1]))
        assert got[0, running[-1]] == -math.inf
    bias = Processors(SamplingParams(logit_bias={".": -7.0}), tokenizer.vocab_size, tokenizer).bias
    assert bias is not None
    assert bias.tolist() == [0, -7, 0, 0, 0]


def test_every_key_is_used_or_left_to_the_engine() -> None:
    """A key that nothing reads would be a silent lie; those of processors change logits or needs."""
    elsewhere = {
        "max_new_tokens", "stop", "ignore_eos", "on_overflow", "seed", "top_p_mode", "bad_words",
        "num_beams", "length_penalty", "early_stopping", "best_of", "best_of_score", "num_return",
        "regex", "choices", "json_schema",
    }  # fmt: skip
    names = {f.name for f in dataclasses.fields(SamplingParams)}
    assert names == elsewhere | EVERYTHING.keys()
    logits = torch.linspace(3, -3, V)[None]
    history = History([list(itertools.islice(itertools.cycle([0, 1, 3]), 8))], [4])
    for name, value in EVERYTHING.items():
        assert not torch.equal(processors(**{name: value})(logits, history), logits), name

"""Constraints hold for every text: expressions, choices and schemas, over any tokens, in any company."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from gptcli.config.schema import ModelConfig, SamplingParams
from gptcli.config.validate import check_sampling
from gptcli.errors import UserError
from gptcli.generate import Engine, complete
from gptcli.model import GPT
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.build import byte_tokenizer, char_tokenizer, train_bpe

PROMPTS = ["a", "def main(", "once upon a time", "x = "]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 8},
        "age": {"type": "integer", "minimum": -5, "maximum": 120},
        "share": {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25},
        "colour": {"enum": ["red", "grün", None]},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "minItems": 1, "maxItems": 3},
    },
    "$defs": {"tag": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"],
                      "additionalProperties": False}},
    "required": ["name", "age", "share", "tags"],
    "additionalProperties": False,
}  # fmt: skip


def make_engine(tokenizer: Tokenizer, vocab_size: int | None = None) -> Engine:
    """Random weights; the vocabulary may have ids that are no token's."""
    size = vocab_size or tokenizer.vocab_size
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=256, vocab_size=size, init_std=0.2))
    model.init_weights(3)
    return Engine(model.eval(), tokenizer)


def bpe() -> Tokenizer:
    return train_bpe(["the quick brown fox, the lazy dog: 2024-05-06 🦓🦓 été yes no true false null "] * 3, 300)


def sentencepiece(*extra: str) -> Tokenizer:
    """Llama's kind: spaces are ▁, bytes that no token has are <0x..>, a first space is dropped."""
    special = ["<unk>", "<s>", "</s>"]
    tokens = [*special, *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdeyno", "▁yes", "▁no", "yes", "é", *extra]
    model = models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], byte_fallback=True, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(special)
    return Tokenizer(backend, {"bos": "<s>", "eos": "</s>", "unk": "<unk>"})


def without_eos() -> Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.special.clear()
    return tokenizer


KINDS = {
    "bytes": byte_tokenizer,
    "bpe": bpe,
    "sentencepiece": sentencepiece,
    "char": lambda: char_tokenizer(["abc 0123456789-=x(defmaino upc{}[]\"':,yes🦓étru fls"]),
    "without eos": without_eos,
}


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest) -> Engine:
    tokenizer = KINDS[request.param]()
    return make_engine(tokenizer, tokenizer.vocab_size + 7)


def ended(engine: Engine) -> str:
    assert engine.tokenizer is not None
    return "stop" if engine.tokenizer.eos_id is None else "eos"


# ---- what holds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "regex", ["[0-9]{4}-[0-9]{2}", "(yes|no|été){1,4}", "🦓{2,3}a?", "a", "(a|ab|abc)(c|bcd)", " ?[a-c]{2,5} "]
)
def test_texts_match_the_expression(engine: Engine, regex: str) -> None:
    texts = engine.generate(PROMPTS * 5, SamplingParams(max_new_tokens=60, seed=1, regex=regex))
    for completion in texts:
        assert re.fullmatch(regex, completion.text), completion
        assert max(completion.ids) < engine.require_tokenizer().vocab_size  # no id that is no token's
        assert completion.finish_reason == ended(engine)


ATOMS = st.sampled_from(["a", "b", "[a-c]", "é", "🦓", "0", "[0-9]", "yes", "(?:no|x)", r"\(", "[^ab]"])
PARTS = st.tuples(ATOMS, st.sampled_from(["", "?", "{2}", "{1,3}"])).map(
    lambda p: f"(?:{p[0]}){p[1]}"
)  # the part of the syntax that Rust and Python share


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(PARTS, min_size=1, max_size=4).map("".join), min_size=1, max_size=3), st.integers(0, 99))
def test_any_expression_is_kept_to(alternatives: list[str], seed: int) -> None:
    regex = "|".join(alternatives)
    for tokenizer in (BYTES, BPE):
        completion = tokenizer.generate(["a"], SamplingParams(max_new_tokens=90, seed=seed, regex=regex))[0]
        assert completion.finish_reason == "eos"
        assert re.fullmatch(regex, completion.text, re.DOTALL)


BYTES, BPE = make_engine(byte_tokenizer()), make_engine(bpe())


def test_one_of_the_choices(engine: Engine) -> None:
    choices = ["yes", "no", "no 🦓", 'a"', "é'"]
    texts = engine.generate(PROMPTS * 8, SamplingParams(max_new_tokens=40, seed=1, choices=choices))
    assert {c.text for c in texts} <= set(choices)
    assert len({c.text for c in texts}) > 1
    assert {c.finish_reason for c in texts} == {ended(engine)}


def test_a_thousand_texts_of_a_schema_are_valid() -> None:
    from jsonschema import Draft202012Validator

    validator, valid = Draft202012Validator(SCHEMA), 0
    params = SamplingParams(max_new_tokens=400, json_schema=json.dumps(SCHEMA), temperature=1.5)
    for engine in (BYTES, BPE):
        for completion in engine.generate(["a"] * 500, params):
            assert completion.finish_reason == "eos"
            validator.validate(json.loads(completion.text))
            valid += 1
    assert valid == 1000


def test_a_schema_may_be_a_file(tmp_path: Any) -> None:
    (tmp_path / "s.json").write_text('{"enum": ["x"]}')
    params = SamplingParams(max_new_tokens=9, json_schema=str(tmp_path / "s.json"))
    assert BYTES.generate(["a"], params)[0].text == '"x"'


# ---- in company -----------------------------------------------------------------------------------------------------


def test_rows_of_all_kinds_side_by_side_are_what_they_are_alone(engine: Engine) -> None:
    plain = SamplingParams(max_new_tokens=25, seed=5, temperature=0.9)
    several = [
        plain,
        dataclasses.replace(plain, regex="[a-c]{1,20}"),
        dataclasses.replace(plain, choices=["yes", "no"]),
        dataclasses.replace(plain, json_schema='{"type": "array", "items": {"type": "boolean"}, "maxItems": 3}'),
        dataclasses.replace(plain, regex="(a|é){2,30}", top_k=3, repetition_penalty=1.3, no_repeat_ngram=4),
        dataclasses.replace(plain, temperature=0.0, regex="[ab]{3,9}", stop=["bb"]),
    ]
    session, together = engine.session(max_rows=5), {}
    for i in range(24):
        session.add(i, PROMPTS[i % 4], several[i % 6], i)
    while session.busy:
        together |= {piece.key: piece.completion for piece in session.step() if piece.completion}
    for i in range(24):
        alone = engine.generate([PROMPTS[i % 4]], several[i % 6], streams=[i])[0]
        assert (together[i].ids, together[i].text, together[i].finish_reason) == (
            alone.ids, alone.text, alone.finish_reason
        )  # fmt: skip


def test_bans_and_lengths_give_way_to_the_constraint() -> None:
    params = SamplingParams(max_new_tokens=9, regex="ab", bad_words=["a", "b"], min_new_tokens=5, logit_bias={"c": 50})
    assert BYTES.generate(["x"], params)[0].text == "ab"


def test_log_probabilities_stay_the_models_own() -> None:
    completion = BYTES.generate(["x"], SamplingParams(max_new_tokens=9, regex="ab"))[0]
    free = SamplingParams(max_new_tokens=9, logit_bias={"a": 0.0})
    assert all(p < -0.1 for p in completion.logprobs)
    assert completion.eos_logprob is not None
    assert completion.eos_logprob < -0.1
    assert BYTES.processors(free).grammar is None


def test_the_best_of_several_keeps_to_it() -> None:
    params = SamplingParams(max_new_tokens=9, regex="[a-f]{3}", best_of=5, num_return=5)
    assert all(re.fullmatch("[a-f]{3}", c.text) for c in complete(BYTES, ["x"], params))


# ---- ends -----------------------------------------------------------------------------------------------------------


def test_too_few_tokens_end_it_early() -> None:
    cut = BYTES.generate(["x"], SamplingParams(max_new_tokens=3, regex="abcd"))[0]
    assert (cut.text, cut.finish_reason) == ("abc", "length")
    just = BYTES.generate(["x"], SamplingParams(max_new_tokens=4, regex="abcd"))[0]
    assert (just.text, just.finish_reason) == ("abcd", "stop")
    half = BYTES.generate(["x"], SamplingParams(max_new_tokens=2, regex="🦓"))[0]
    assert (half.text, half.finish_reason) == ("\ufffd", "length")


def test_end_of_text_ignored_is_none() -> None:
    params = SamplingParams(max_new_tokens=30, ignore_eos=True, seed=1)
    for regex, text in (("ab?", "ab"), ("a{2,5}", "aaaaa")):
        completion = BYTES.generate(["x"], dataclasses.replace(params, regex=regex))[0]
        assert (completion.text, completion.finish_reason) == (text, "stop")
    endless = BYTES.generate(["x"], dataclasses.replace(params, regex="a*"))[0]
    assert (endless.text, endless.finish_reason) == ("a" * 30, "length")


def test_a_stop_string_still_cuts() -> None:
    completion = BYTES.generate(["x"], SamplingParams(max_new_tokens=30, regex="aaabaaa", stop=["b"]))[0]
    assert (completion.text, completion.finish_reason) == ("aaa", "stop")


def test_a_vocabulary_that_cannot_go_on_says_so() -> None:
    engine = make_engine(char_tokenizer(["ab"]))
    with pytest.raises(UserError, match="regex: no token of this tokenizer can begin"):
        engine.generate(["a"], SamplingParams(regex="é"))
    dead = engine.generate(["a"], SamplingParams(regex="aé"))[0]
    assert (dead.text, dead.finish_reason) == ("a", "length")


def test_a_first_space_that_would_be_dropped_is_not_written() -> None:
    engine = make_engine(sentencepiece())
    params = SamplingParams(max_new_tokens=20, regex=" yes| ?no")
    assert {c.text for c in engine.generate([""] * 20, params)} == {"no"}
    assert {c.text for c in engine.generate(["a"] * 40, params)} == {" yes", " no", "no"}


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"regex": "a("}, "regex: unclosed group"),
        ({"regex": "(?=a)b"}, "regex: look-around"),
        ({"json_schema": "nowhere.json"}, "json_schema: nowhere.json: No such file"),
        ({"json_schema": "{"}, "json_schema: not JSON"),
        ({"json_schema": '{"type": "strin"}'}, "json_schema: Invalid type: strin"),
        ({"json_schema": '{"type": "array", "uniqueItems": true}'}, 'json_schema: Unimplemented keys: ["uniqueItems"]'),
    ],
)
def test_what_cannot_be_followed_is_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as raised:
        BYTES.check("a", SamplingParams(**changes))
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_contradictions_are_refused() -> None:
    with pytest.raises(UserError, match=r"regex, sampling\.json_schema: give one of them"):
        check_sampling(SamplingParams(regex="a", json_schema="{}"), "here")
    with pytest.raises(UserError, match="choices: a search with num_beams cannot"):
        check_sampling(SamplingParams(choices=["a"], num_beams=2), "here")


def test_gpt1s_words_cannot_be_held_to_it() -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a</w>": 0, "a": 1}, merges=[], end_of_word_suffix="</w>"))
    backend.decoder = decoders.BPEDecoder("</w>")
    with pytest.raises(UserError, match="tokens spell text by themselves"):
        make_engine(Tokenizer(backend, {})).check("a", SamplingParams(regex="a"))


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"regex: needs llguidance: pip install 'gptcli\[constrain\]'"):
        make_engine(byte_tokenizer()).check("a", SamplingParams(regex="a"))

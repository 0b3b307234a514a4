"""All formats of preferences, what is refused, and how they become ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcli.config.schema import DataBlock
from gptcli.data.examples import open_examples
from gptcli.errors import UserError
from gptcli.rlhf.preferences import (
    Comparison,
    Pair,
    encode_preference,
    length_accuracy,
    parse_preference,
    split_transcripts,
)
from gptcli.stages.preferences import Preferences
from gptcli.tokenizer.build import byte_tokenizer
from gptcli.tokenizer.chat_template import CHATML, CHATML_TOKENS, encode_chat, render_chat

TOKENIZER = byte_tokenizer()
EOS = 256


def pairs(row: dict[str, Any]) -> set[tuple[int, int, float, float]]:
    return {(p.better, p.worse, p.p, p.margin) for p in parse_preference(row).pairs}


def test_a_pair_with_its_margin_and_soft_label() -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert pairs(row) == {(0, 1, 1.0, 0.0)}
    assert pairs({**row, "margin": 2, "p_chosen": 0.7}) == {(0, 1, 0.7, 2.0)}
    assert parse_preference(row).responses == ["a", "b"]


def test_rankings_are_all_their_pairs_and_ties_none() -> None:
    row = {"prompt": "p", "responses": ["a", "b", "c", "d"]}
    assert pairs({**row, "ranking": [2, 0, 3, 1]}) == {
        (2, 0, 1, 0), (2, 3, 1, 0), (2, 1, 1, 0), (0, 3, 1, 0), (0, 1, 1, 0), (3, 1, 1, 0),
    }  # fmt: skip
    assert pairs({**row, "ranking": [2, [0, 3], 1]}) == {
        (2, 0, 1, 0), (2, 3, 1, 0), (2, 1, 1, 0), (0, 1, 1, 0), (3, 1, 1, 0),
    }  # fmt: skip


def test_ratings_have_their_differences_as_margins() -> None:
    row = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 7, 1]}
    assert pairs(row) == {(1, 0, 1, 6), (1, 2, 1, 6)}


def test_transcripts_part_at_the_last_answer_that_both_begin() -> None:
    before = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how?\n\nAssistant:"
    assert split_transcripts(before + " so", before + " so not") == (before, " so", " so not")
    longer = before + " a\n\nHuman: b\n\nAssistant: c"
    assert split_transcripts(longer, before + " z") == (before, longer[len(before) :], " z")
    assert parse_preference({"chosen": before + " x", "rejected": before + " y"}).prompt == before


BAD = [
    ({"prompt": "p"}, "expected prompt, chosen, rejected"),
    ({"prompt": "p", "chosen": "a", "rejected": "a"}, "same text"),
    ({"prompt": "p", "chosen": "a"}, "rejected: missing"),
    ({"prompt": "p", "chosen": "a", "rejected": ""}, "the answer is empty"),
    ({"prompt": "p", "chosen": "a", "rejected": " \n"}, "the answer is empty"),
    ({"prompt": "p", "chosen": "a", "rejected": 3}, "expected text"),
    ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt: expected text"),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "p_chosen": 1.5}, "no probability"),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "much"}, "margin: expected a number"),
    ({"chosen": "Human: a", "rejected": "Human: b"}, "share no turn"),
    ({"prompt": "p", "responses": ["a"], "ranking": [0]}, "at least two"),
    ({"prompt": "p", "responses": ["a", ""], "ranking": [0, 1]}, r"responses\[1\]: is empty"),
    ({"prompt": "p", "responses": ["a", "b"]}, "a ranking or scores"),
    ({"prompt": "p", "responses": ["a", "b"], "ranking": [0, 2]}, "each place from 0 to 1"),
    ({"prompt": "p", "responses": ["a", "b"], "ranking": 1}, "each place"),
    ({"prompt": "p", "responses": ["a", "b"], "ranking": ["0", "1"]}, "each place"),
    ({"prompt": "p", "responses": ["a", "b"], "ranking": [False, True]}, "each place"),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": -3}, "margin: -3.0: .* not below 0"),
    ({"messages": "Hi", "chosen": "a", "rejected": "b"}, "messages: expected a list of {role, content}"),
    (
        {"messages": [{"role": "assistant", "content": "a"}], "prompt": "p", "chosen": "a", "rejected": "b"},
        "messages: ends with an answer",
    ),
    ({"prompt": "p", "responses": ["a", "b"], "scores": [1]}, "expected 2 numbers"),
    ({"prompt": "p", "responses": ["a", "b"], "scores": [2, float("nan")]}, "expected 2 numbers"),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=range(len(BAD)))
def test_a_bad_line_says_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        parse_preference(row)


@pytest.mark.parametrize("tie", [{"ranking": [[0, 1]]}, {"scores": [2, 2]}])
def test_answers_that_are_all_tied_are_no_mistake_and_no_pair(tie: dict[str, Any]) -> None:
    assert parse_preference({"prompt": "p", "responses": ["a", "b"], **tie}).pairs == []


def test_a_bad_line_is_named_or_left_out(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    file.write_text("".join(json.dumps(row) + "\n" for row in (good, {**good, "rejected": "a"}, good)))
    data = {"train": [str(file)], "val_fraction": 0.0}
    with pytest.raises(UserError, match=r"pairs.jsonl:2: chosen and rejected are the same"):
        open_examples(DataBlock(**data), parse_preference)
    found = open_examples(DataBlock(**data, skip_bad=True), parse_preference)
    assert (len(found.train), len(found.skipped)) == (2, 1)


@given(st.text(st.characters(codec="utf-8"), max_size=9), st.text(st.characters(codec="utf-8"), min_size=1, max_size=9))
def test_ids_are_those_of_prompt_and_response_apart_and_an_end(prompt: str, response: str) -> None:
    if not response.strip():
        response = "x"
    row = {"prompt": prompt, "chosen": response, "rejected": response + "!"}
    made = encode_preference(parse_preference(row), TOKENIZER, lambda text: [EOS, *TOKENIZER.encode(text)], 200)
    assert made.prompt == [EOS, *TOKENIZER.encode(prompt)]
    assert made.responses[0] == [*TOKENIZER.encode(response), EOS]
    assert made.rows[1] == [*made.prompt, *TOKENIZER.encode(response + "!"), EOS]


def test_a_long_prompt_loses_its_beginning_and_a_long_response_is_refused() -> None:
    preference = parse_preference({"prompt": "0123456789", "chosen": "abc", "rejected": "de"})
    made = encode_preference(preference, TOKENIZER, TOKENIZER.encode, 8)
    assert [len(row) for row in made.rows] == [8, 7]
    assert TOKENIZER.decode(made.prompt) == "6789"
    assert made.cut
    assert not encode_preference(preference, TOKENIZER, TOKENIZER.encode, 14).cut
    with pytest.raises(UserError, match="4 tokens leaves no room"):
        encode_preference(preference, TOKENIZER, TOKENIZER.encode, 4)


def test_a_conversation_is_encoded_as_when_it_is_answered() -> None:
    """Its special tokens are tokens, whatever the text beside it shows."""
    tokenizer = byte_tokenizer().for_chat(CHATML, CHATML_TOKENS, "<|im_end|>")
    messages = [{"role": "user", "content": "Hi"}]
    for row in (
        {"messages": messages, "chosen": "a", "rejected": "b"},
        {"messages": messages, "prompt": render_chat(tokenizer, messages), "responses": ["a", "b"], "ranking": [0, 1]},
    ):
        made = encode_preference(parse_preference(row), tokenizer, lambda ids: list(ids), 200)
        assert made.prompt == encode_chat(tokenizer, messages)
        assert made.prompt[0] == tokenizer.encode("<|im_start|>", parse_special=True)[0] > EOS


def test_the_baseline_that_takes_the_longer_one() -> None:
    lengths = Comparison([1], [[1, 2, 3], [1], [2]], [Pair(0, 1), Pair(2, 0), Pair(1, 2, p=0.9)])
    assert length_accuracy([lengths]) == pytest.approx((1 + 0 + 0.5) / 3)
    soft = Comparison([1], [[1, 2], [1]], [Pair(0, 1, p=0.7)])
    assert length_accuracy([soft]) == pytest.approx(0.7)
    assert length_accuracy([lengths, soft]) == pytest.approx((0.5 + 0.7) / 2)  # as an accuracy counts them


def test_the_baseline_by_length_takes_the_direction_of_train() -> None:
    long, short = (Comparison([1], [[1, 2], [1]], [Pair(*better)]) for better in ((0, 1), (1, 0)))
    held_out = [short, short, short, long]
    assert Preferences([long], held_out).length_baseline() == {"val_length_accuracy": 0.25}
    assert Preferences([short], held_out).length_baseline() == {"val_length_accuracy": 0.75}

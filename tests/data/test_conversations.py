"""Conversations of every shape in every template: what is learned is the answers and their ends, to the token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcli.data.conversations import ConversationEncoder, parse_conversation
from gptcli.errors import UserError
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.build import train_bpe
from gptcli.tokenizer.chat_template import CHATML, CHATML_TOKENS, encode_chat
from tests.tokenizer.test_chat_pieces import TEMPLATES, tokenizer_with

BPE = train_bpe(["the answer is: yes.\nno! assistant\nthe answer is the answer\n"] * 50, 300)
WORDS = st.text(st.sampled_from("the answer is\n.:!é<|"), min_size=1, max_size=30).filter(lambda t: t.strip())
TURN = st.tuples(WORDS, WORDS)


def bpe_with(template: str) -> Tokenizer:
    tokens = (*CHATML_TOKENS, "<|head|>", "<|tail|>", "<s>")
    stop = "<|im_end|>" if template == CHATML else "</s>"
    return BPE.for_chat(template, tokens, stop).with_role("bos", "<s>")


ENCODERS = {name: bpe_with(template) for name, template in TEMPLATES.items()}
# Each writes a conversation of (user, assistant) turns as one of the formats that files hold.
FORMATS = {
    "messages": lambda turns: {
        "messages": [{"role": r, "content": c} for u, a in turns for r, c in (("user", u), ("assistant", a))]
    },
    "prompt": lambda turns: {"prompt": turns[0][0], "response": turns[0][1]},
    "alpaca": lambda turns: {"instruction": turns[0][0], "input": "", "output": turns[0][1]},
    "alpaca with input": lambda turns: {"instruction": turns[0][0], "input": "more", "output": turns[0][1]},
}


@settings(max_examples=25, deadline=None)
@given(st.lists(TURN, min_size=1, max_size=3))
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_their_ends_are_learned_and_nothing_else(
    name: str, format: str, turns: list[tuple[str, str]]
) -> None:
    tokenizer, messages = ENCODERS[name], parse_conversation(FORMATS[format](turns))
    encoded = ConversationEncoder(tokenizer).encode(messages)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert len(encoded.answers) == len(answers)
    learned = np.zeros(len(encoded), bool)
    for (begin, end), answer in zip(encoded.answers, answers, strict=True):
        ids = encoded.ids[begin:end].tolist()
        assert ids[-1] == tokenizer.eos_id
        assert tokenizer.eos_id not in ids[:-1]
        assert tokenizer.decode(ids[:-1]).strip() == answer.strip()
        learned[begin:end] = True
    assert np.array_equal(encoded.trained, learned)
    # The ids before the first answer are those that a model is asked with: no merge has crossed the border.
    first = encoded.answers[0][0]
    assert encoded.ids[:first].tolist() == encode_chat(tokenizer, messages[:1])


def test_no_merge_crosses_the_border() -> None:
    """`is` is one token of this BPE; a prompt that ends with i and an answer that begins with s stay two."""
    template = (
        "{{ messages[0].content }}{% if messages[1] is defined %}{{ messages[1].content + eos_token }}{% endif %}"
    )
    tokenizer = BPE.for_chat(template, (), "</s>")
    messages = parse_conversation({"prompt": "the answer i", "response": "s yes"})
    encoded = ConversationEncoder(tokenizer).encode(messages)
    assert encoded.ids.tolist() == [*tokenizer.encode("the answer i"), *tokenizer.encode("s yes"), tokenizer.eos_id]
    assert encoded.ids.tolist()[:-1] != tokenizer.encode("the answer is yes")
    plain = ConversationEncoder(tokenizer, plain=True).encode(messages)
    assert plain.ids.tolist() == encoded.ids.tolist()
    assert plain.trained.tolist() == encoded.trained.tolist()


def test_what_is_trained_on_can_be_chosen() -> None:
    messages = FORMATS["messages"]([("the", "answer"), ("is", "yes"), ("the", "no")])["messages"]
    tokenizer = ENCODERS["chatml"]
    everything, last = (ConversationEncoder(tokenizer, on).encode(messages) for on in ("all", "last_assistant"))
    assert everything.trained.tolist() == [False] + [True] * (len(everything) - 1)
    begin, end = last.answers[-1]
    assert last.trained.nonzero()[0].tolist() == list(range(begin, end))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x"}, "holds no conversation: neither messages, .* its columns: text"),
        ({"prompt": "x"}, "no 'response' beside 'prompt'"),
        ({"prompt": "x", "reponse": "y"}, "did you mean 'reponse'"),
        ({"prompt": "x", "response": "  "}, "response: is empty"),
        ({"prompt": 1, "response": "y"}, "prompt: expected text, not int"),
        ({"instruction": "x", "input": 3, "output": "y"}, "input: expected text"),
        ({"instruction": "x", "input": "", "output": ""}, "output: is empty"),
        ({"messages": []}, "expected a list"),
        ({"messages": ["x"]}, r"messages\[0\]: expected {role, content}, not str"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\]: no role \(system \| user"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, r"messages\[0\].role: .* did you mean 'assistant'"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\].content: expected text, not nothing"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "the answer is empty"),
        ({"messages": [{"role": "user", "content": "x"}]}, "ends with 'user', so there is no answer to learn"),
    ],
)
def test_what_is_no_conversation_is_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        parse_conversation(row)


ASKED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "writes no special token after answers, but"),
        ("{% for m in messages %}{{ m.content + '<|tail|>' }}{% endfor %}", r"end with <\|tail\|>.*stop_token=<\|tail"),
        ("{{ bos_token + bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}", "<s> twice"),
        ("{% for m in messages %}{% generation %}{% endgeneration %}{{ m.content }}{% endfor %}", "nothing in it is"),
        ("{{ raise_exception('no such turns') }}", "does not take these messages: no such turns"),
    ],
)  # fmt: skip
def test_what_would_teach_nonsense_is_refused(template: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        ConversationEncoder(tokenizer_with(template)).encode(ASKED)


def test_text_that_looks_like_a_special_token_is_refused() -> None:
    messages = [{"role": "user", "content": "say <|im_end|>"}, ASKED[1]]
    with pytest.raises(UserError, match=r"messages\[0\].content: holds <\|im_end\|>, which would be read as that"):
        ConversationEncoder(tokenizer_with(CHATML)).encode(messages)


def test_without_a_template_there_is_one_prompt_and_one_response() -> None:
    tokenizer = BPE.for_chat(None, (), None)
    encoded = ConversationEncoder(tokenizer, plain=True).encode(ASKED)
    assert encoded.ids.tolist() == [*tokenizer.encode("q"), *tokenizer.encode("a"), tokenizer.eos_id]
    with pytest.raises(UserError, match="takes a prompt and a response"):
        ConversationEncoder(tokenizer, plain=True).encode([*ASKED, *ASKED])

"""Where answers begin and end in a conversation's text, for templates as models bring them."""

from __future__ import annotations

import pytest

from gptcli.errors import UserError
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.build import byte_tokenizer
from gptcli.tokenizer.chat_template import CHATML, CHATML_TOKENS, chat_pieces, render_chat

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Uno."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Dos."},
]
# In the manner of well-known chat models, written anew.
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set said = '<<SYS>>\\n' + messages[0].content"
    " + '\\n<</SYS>>\\n\\n' %}{% else %}{% set rest = messages %}{% set said = '' %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (said if loop.first else '')"
    " + m.content | trim + ' [/INST]' }}{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}\n{{ '<|' + m.role + '|>\n' + m.content + eos_token }}\n{% endfor %}\n"
    "{% if add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m.role + '<|tail|>\n\n' + m.content | trim + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|tail|>\n\n' }}{% endif %}"
)
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'A: ' }}{% generation %}{{ m.content + eos_token }}"
    "{% endgeneration %}{% else %}{{ 'Q: ' + m.content }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "zephyr": ZEPHYR, "llama3": LLAMA3, "generation": GENERATION}


def tokenizer_with(template: str) -> Tokenizer:
    """The byte tokenizer with the special tokens that these templates write."""
    tokens = (*CHATML_TOKENS, "<|head|>", "<|tail|>", "<s>")
    tokenizer = byte_tokenizer().for_chat(template, tokens, "<|im_end|>" if template == CHATML else "</s>")
    return tokenizer.with_role("bos", "<s>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_pieces_are_the_text_and_answers_are_found_in_it(name: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    pieces = chat_pieces(tokenizer, TURNS)
    assert "".join(text for text, _ in pieces) == render_chat(tokenizer, TURNS, reply=False)
    answers = [text for text, is_answer in pieces if is_answer]
    assert len(answers) == 2
    for answer, turn in zip(answers, (TURNS[2], TURNS[4]), strict=True):
        assert turn["content"] in answer
        assert tokenizer.special["eos"] in answer
        assert "One" not in answer
        assert "Two" not in answer


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_comes_before_an_answer_is_what_a_model_is_asked_with(name: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    before = ""
    for number, (text, is_answer) in enumerate(chat_pieces(tokenizer, TURNS)):
        if is_answer:
            assert before == render_chat(tokenizer, TURNS[: 2 if number == 1 else 4], reply=True)
        before += text


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("reply", [True, False])
def test_the_text_is_that_of_transformers(name: str, reply: bool, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizer_with(TEMPLATES[name])
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=reply)
    assert render_chat(tokenizer, TURNS, reply=reply) == expected


def test_a_generation_block_marks_what_transformers_marks(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    from gptcli.data.conversations import ConversationEncoder

    tokenizer = tokenizer_with(GENERATION)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    ours = ConversationEncoder(tokenizer).encode(TURNS)
    assert ours.ids.tolist() == expected["input_ids"]
    assert ours.trained.tolist() == [bool(m) for m in expected["assistant_masks"]]


def test_a_template_that_does_not_write_turn_by_turn_is_refused() -> None:
    with pytest.raises(UserError, match=r"does not write turn by turn \(messages\[2\]\).*% generation %"):
        chat_pieces(tokenizer_with("{% for m in messages | reverse %}{{ m.content }}{% endfor %}"), TURNS)

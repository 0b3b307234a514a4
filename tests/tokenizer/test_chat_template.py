"""Chat templates: the text of transformers, character for character; clear complaints; a plain default."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptcli.errors import UserError
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.build import byte_tokenizer
from gptcli.tokenizer.chat_template import chat_stop, encode_chat, render_chat

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": ' How much is 1 < 2 & "3"? é☃ '},
    {"role": "assistant", "content": "True."},
    {"role": "user", "content": "Why?", "name": "Ada"},
]
TEMPLATES = {
    "chatml": "{% for m in messages %}\n  {{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}\n"
    "{% endfor %}\n{% if add_generation_prompt %}\n    {{ '<|im_start|>assistant\n' }}\n{% endif %}\n",
    "special": "{{ bos_token }}{% for m in messages %}{{ m.content | trim }}{{ eos_token }}{% endfor %}{{ pad_token }}",
    "json": "{{ messages | tojson }}|{{ messages[0] | tojson(indent=2) }}|"
    "{{ {'b': 1, 'a': '<'} | tojson(sort_keys=True) }}",
    "loop": "{% for m in messages %}{% if loop.index0 == 2 %}{% continue %}{% endif %}{{ m.role }};"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages if m.role == 'user' %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }} {{ dict(a=1).a }} {{ tools is none }} {{ documents is none }} {{ missing }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% set x = 1 %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}",
    "date": "{{ strftime_now('%Y') }}",
    "macro": "{%- macro say(m) -%}[{{ m.role | upper }}] {{ m.content }}{%- endmacro -%}"
    "{%- for m in messages %}{{ say(m) }}\n{% endfor -%}",
}


def with_template(template: str | None) -> Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("reply", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name: str, reply: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = with_template(TEMPLATES[name])
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=reply)
    assert render_chat(tokenizer, TURNS, reply=reply) == expected
    ids = theirs.apply_chat_template(TURNS, add_generation_prompt=reply, return_dict=False)
    assert encode_chat(tokenizer, TURNS, reply=reply) == ids


def test_special_tokens_that_a_template_writes_are_special() -> None:
    ids = encode_chat(with_template("{{ messages[0].content }}{{ eos_token }}"), [{"role": "user", "content": "a"}])
    assert ids == [97, 256]


@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "broken (line 1"),
        ("{{ messages[0].nothing.more }}", "nothing"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages + 1 }}", "does not take"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_refusals_are_one_line(template: str, word: str) -> None:
    with pytest.raises(UserError, match="chat template") as caught:
        render_chat(with_template(template), TURNS)
    assert word in str(caught.value)


def test_a_model_without_a_template_gets_a_plain_one() -> None:
    plain = with_template(None)
    text = 'Be brief.\n\nUser: How much is 1 < 2 & "3"? é☃\nAssistant: True.\nUser: Why?\n'
    assert render_chat(plain, TURNS, reply=False) == text
    assert render_chat(plain, TURNS) == text + "Assistant:"
    assert bytes(encode_chat(plain, TURNS)).decode() == text + "Assistant:"
    assert chat_stop(plain) == ["\nUser:"]
    assert chat_stop(with_template("x")) == []

"""From messages to the text a model continues: its tokenizer's Jinja template, rendered as transformers renders it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gptcli.errors import UserError
from gptcli.tokenizer.tokenizer import Tokenizer

# What a model without a template gets: "User: ...\nAssistant:", after the system's text. Such a model would go on
# and write the user's next line itself, so its turn ends there.
PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == "system" -%}{{ message.content | trim + "\n\n" }}
{%- else -%}{{ message.role | capitalize + ": " + message.content | trim + "\n" }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}Assistant:{%- endif -%}"""
PLAIN_STOP = "\nUser:"

# The default of supervised finetuning, after OpenAI's chat markup language, which many open models speak.
CHATML = """\
{%- for message in messages -%}
{{ "<|im_start|>" + message.role + "\n" + message.content + "<|im_end|>\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\n" }}{%- endif -%}"""
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
# Around what {% generation %} holds, where it is to be found again: characters that are for private use.
MARKS = ("\ue0f8", "\ue0f9")

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = Mapping[str, Any]  # role and content at least


def are_messages(value: Any) -> bool:
    """Whether it is a conversation: a list of {role, content}, and not empty."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in value)
    )


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], *, reply: bool = True) -> list[int]:
    """Ids of a conversation, with the beginning of an answer after it if one is to be written (`reply`).

    The template writes special tokens, bos included, by their text. Raises UserError for messages that it refuses.
    """
    text = render_chat(tokenizer, messages, reply=reply)
    if tokenizer.chat_template is not None:
        return tokenizer.encode(text, parse_special=True)
    bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    return bos + tokenizer.encode(text)


def chat_pieces(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[tuple[str, bool]]:
    """The conversation as text, cut where an answer begins and ends: (piece, whether it is an answer's).

    An answer is what the template marks with {% generation %}; else what its text grows by with that message, after
    the beginning of a reply. Raises UserError for a template that does not write turn by turn.
    """
    if GENERATION_TAG.search(_template_of(tokenizer)):
        parts = re.split("|".join(MARKS), render_chat(tokenizer, messages, reply=False, marked=True))
        return [(part, number % 2 == 1) for number, part in enumerate(parts)]
    text, pieces, at = render_chat(tokenizer, messages, reply=False), [], 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render_chat(tokenizer, messages[:number])
        after = render_chat(tokenizer, messages[: number + 1], reply=False)
        end = next((i for i, (a, b) in enumerate(zip(text, after, strict=False)) if a != b), min(len(text), len(after)))
        if not text.startswith(before) or end <= len(before):
            raise UserError(
                f"the chat template does not write turn by turn (messages[{number}]), so what the model is to learn "
                "cannot be told apart; mark it in the template with {% generation %}"
            )
        pieces += [(text[at : len(before)], False), (text[len(before) : end], True)]
        at = end
    return [*pieces, (text[at:], False)]


def render_chat(tokenizer: Tokenizer, messages: Sequence[Message], *, reply: bool = True, marked: bool = False) -> str:
    """The conversation as text. Raises UserError for a template that is broken or refuses these messages.

    marked: with MARKS around what stands in {% generation %}."""
    roles = {f"{role}_token": token for role, token in tokenizer.special.items()}
    try:
        template = _compile(_template_of(tokenizer), marked)
        return template.render(
            messages=[dict(m) for m in messages], tools=None, documents=None, add_generation_prompt=reply, **roles
        )
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template is broken (line {error.lineno}: {error.message})") from error
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise UserError(f"the chat template does not take these messages: {error}") from error


def _template_of(tokenizer: Tokenizer) -> str:
    return PLAIN_TEMPLATE if tokenizer.chat_template is None else tokenizer.chat_template


def chat_stop(tokenizer: Tokenizer) -> list[str]:
    """Strings that end an answer, beside end-of-text."""
    return [PLAIN_STOP] if tokenizer.chat_template is None else []


def end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a text: end-of-text, and what the chat template writes after an answer where that is another
    special token, as in Llama 3's (`<|eot_id|>`)."""
    ends = [i for i in (tokenizer.eos_id, _end_of_turn(tokenizer)) if i is not None]
    return tuple(dict.fromkeys(ends))


def _end_of_turn(tokenizer: Tokenizer) -> int | None:
    if tokenizer.chat_template is None:
        return None
    answer = "An answer."
    turns = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": answer}]
    try:
        _, found, after = render_chat(tokenizer, turns, reply=False).rpartition(answer)
        ids = tokenizer.encode(after, parse_special=True) if found else []
    except UserError:  # a template that takes other messages alone
        return None
    return next((i for i in ids if i in tokenizer.special_ids), None)


def special_in(tokenizer: Tokenizer, text: str) -> str | None:
    """A special token that `text` would turn into if a chat template wrote it."""
    return next((token for token in sorted(tokenizer.special_texts) if token in text), None)


@lru_cache(maxsize=8)
def _compile(template: str, marked: bool) -> jinja2.Template:
    """A template is a stranger's code: it runs in a sandbox and sees plain data only."""
    block = _MarkedGenerationBlock if marked else _GenerationBlock
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[block, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
    return environment.from_string(template)


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the model is to learn; in a text it changes nothing."""

    tags = {"generation"}  # noqa: RUF012, jinja2's own type

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(self.around(body), lineno=line)

    def around(self, body: list[nodes.Node]) -> list[nodes.Node]:
        return body


class _MarkedGenerationBlock(_GenerationBlock):
    def around(self, body: list[nodes.Node]) -> list[nodes.Node]:
        begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in MARKS)
        return [begin, *body, end]


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, **more: Any) -> str:
    """Jinja's own filter would escape <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, **more)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)

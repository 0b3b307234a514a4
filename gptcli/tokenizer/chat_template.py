"""From messages to the text a model continues: its tokenizer's Jinja template, rendered as transformers renders it."""

from __future__ import annotations

import json
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

Message = Mapping[str, Any]  # role and content at least


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], *, reply: bool = True) -> list[int]:
    """Ids of a conversation, with the beginning of an answer after it if one is to be written (`reply`).

    The template writes special tokens, bos included, by their text. Raises UserError for messages that it refuses.
    """
    text = render_chat(tokenizer, messages, reply=reply)
    if tokenizer.chat_template is not None:
        return tokenizer.encode(text, parse_special=True)
    bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    return bos + tokenizer.encode(text)


def render_chat(tokenizer: Tokenizer, messages: Sequence[Message], *, reply: bool = True) -> str:
    """The conversation as text. Raises UserError for a template that is broken or refuses these messages."""
    roles = {f"{role}_token": token for role, token in tokenizer.special.items()}
    try:
        template = _compile(PLAIN_TEMPLATE if tokenizer.chat_template is None else tokenizer.chat_template)
        return template.render(
            messages=[dict(m) for m in messages], tools=None, documents=None, add_generation_prompt=reply, **roles
        )
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template is broken (line {error.lineno}: {error.message})") from error
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise UserError(f"the chat template does not take these messages: {error}") from error


def chat_stop(tokenizer: Tokenizer) -> list[str]:
    """Strings that end an answer, beside end-of-text."""
    return [PLAIN_STOP] if tokenizer.chat_template is None else []


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    """A template is a stranger's code: it runs in a sandbox and sees plain data only."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
    return environment.from_string(template)


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the model is to learn; in a text it changes nothing."""

    tags = {"generation"}  # noqa: RUF012, jinja2's own type

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, **more: Any) -> str:
    """Jinja's own filter would escape <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, **more)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)

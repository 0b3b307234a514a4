"""Prompts out of files of any size: each line is one, and may set parameters of its own."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptcli.config.load import build, to_tree
from gptcli.config.schema import SamplingParams
from gptcli.config.validate import check_sampling
from gptcli.data.sources import OnBad, has_surrogates, parse_jsonl, read_lines, refuse, suffix
from gptcli.errors import UserError, nearest
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.chat_template import are_messages, chat_stop, encode_chat, render_chat

STDIN = "-"
JSON_LINES = (".jsonl", ".ndjson", ".json")
KEYS = ("id", "prompt", "messages")
PARAMETERS = tuple(field.name for field in dataclasses.fields(SamplingParams))


@dataclass(frozen=True)
class Job:
    """One prompt to continue. `where` is FILE:LINE, `changes` are the parameters that the line itself sets."""

    where: str
    id: str | int
    prompt: str
    params: SamplingParams
    changes: dict[str, Any]
    ids: tuple[int, ...] | None = None  # of messages, whose template writes special tokens
    messages: list[dict[str, str]] | None = None

    @property
    def feed(self) -> str | Sequence[int]:
        """What the engine continues."""
        return self.prompt if self.ids is None else self.ids

    @property
    def stream(self) -> int:
        """The number of its random stream, from its id alone: its place in the file and its neighbours are nothing
        to it. 48 bits, so that best_of may count on from there."""
        return stream_of(self.id)


def stream_of(id: str | int) -> int:
    return int.from_bytes(hashlib.blake2b(json.dumps(id).encode(), digest_size=6).digest(), "little")


def read_jobs(source: str, params: SamplingParams, tokenizer: Tokenizer, *, on_bad: OnBad = refuse) -> Iterator[Job]:
    """The prompts of a file, or of stdin ("-"), one at a time.

    Lines are JSON objects where the file's name says so, on stdin where the first begins with "{"; else each is the
    text of a prompt. Blank lines are passed over. `on_bad` gets the UserError, FILE:LINE: reason, of a line that is
    no prompt.
    """
    if source == STDIN:
        name, lines = "<stdin>", _stdin_lines()
        first = next(lines, b"")
        is_json, lines = first.lstrip().startswith(b"{"), itertools.chain([first], lines)
    else:
        name, lines = source, read_lines(Path(source))
        is_json = suffix(Path(source)) in JSON_LINES
    rows = parse_jsonl(lines, name, on_bad=on_bad) if is_json else _plain(lines, name, on_bad)
    for number, row in rows:
        where = f"{name}:{number}"
        try:
            yield _job(where, number, row, params, tokenizer)
        except UserError as error:
            on_bad(error)


def _stdin_lines() -> Iterator[bytes]:
    return iter(sys.stdin.buffer)


def _plain(lines: Iterable[bytes], name: str, on_bad: OnBad) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError:
            on_bad(UserError(f"{name}:{number}: not UTF-8"))
            continue
        if text.strip():
            yield number, {"prompt": text}


def _job(where: str, number: int, row: dict[str, Any], params: SamplingParams, tokenizer: Tokenizer) -> Job:
    for key in row:
        if key not in (*KEYS, *PARAMETERS):
            hint = nearest(key, [*KEYS, *PARAMETERS]) or f"; expected {', '.join(KEYS)} or a key of sampling"
            raise UserError(f"{where}: unknown key {key!r}{hint}")
    if has_surrogates(json.dumps(row, ensure_ascii=False)):
        raise UserError(f"{where}: holds half of a surrogate pair")
    id = row.get("id")
    if id is None:
        id = number
    elif not isinstance(id, str | int) or isinstance(id, bool):
        raise UserError(f"{where}: id: expected text or a whole number, not {json.dumps(id)}")
    changes = {key: value for key, value in row.items() if key not in KEYS}
    if changes:
        schema = changes.get("json_schema")
        inline = {"json_schema": json.dumps(schema)} if isinstance(schema, dict) else {}
        params = build(SamplingParams, {**to_tree(params), **changes, **inline}, where=where)
        check_sampling(params, where)
    if params.num_return > 1:
        raise UserError(f"{where}: num_return: each line gets one text; repeat the line with another id for more")
    if ("prompt" in row) == ("messages" in row):
        raise UserError(f"{where}: give a prompt or messages, one of them")
    if "messages" in row:
        return _chat_job(Job(where, id, "", params, changes), row["messages"], tokenizer)
    if not isinstance(row["prompt"], str):
        raise UserError(f"{where}: prompt: expected text, not {json.dumps(row['prompt'])[:40]}")
    return Job(where, id, row["prompt"], params, changes)


def _chat_job(job: Job, messages: Any, tokenizer: Tokenizer) -> Job:
    """A conversation whose next turn is to be written, in the tokenizer's chat template."""
    if not are_messages(messages):
        raise UserError(f"{job.where}: messages: expected a list of {{role, content}}")
    try:
        text, ids = render_chat(tokenizer, messages), encode_chat(tokenizer, messages)
    except UserError as error:
        raise UserError(f"{job.where}: {error}") from error
    params = dataclasses.replace(job.params, stop=[*job.params.stop, *chat_stop(tokenizer)])
    return dataclasses.replace(job, prompt=text, ids=tuple(ids), params=params, messages=messages)

"""A conversation: what was said, what of it a model still sees, and the files that keep it. No model here."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptcli.data.conversations import parse_conversation
from gptcli.data.sources import read_jsonl
from gptcli.errors import UserError
from gptcli.files import publish_text
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.chat_template import encode_chat

Message = dict[str, Any]  # role and content at least


@dataclass(frozen=True)
class Conversation:
    """A system prompt and turns. A turn is a user's message and what answers it; the last may wait for its answer."""

    system: str | None = None
    turns: tuple[tuple[Message, ...], ...] = ()

    @classmethod
    def of(cls, messages: Sequence[Message]) -> Conversation:
        first = messages[0] if messages else None
        system = first["content"] if first is not None and first["role"] == "system" else None
        turns: list[tuple[Message, ...]] = []
        for message in messages[system is not None :]:
            if message["role"] == "user" or not turns:
                turns.append(())
            turns[-1] += (message,)
        return cls(system, tuple(turns))

    def messages(self, *, since: int = 0) -> list[Message]:
        """From turn `since` on; the system prompt always."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return system + [message for turn in self.turns[since:] for message in turn]

    def asked(self, text: str) -> Conversation:
        return replace(self, turns=(*self.turns, ({"role": "user", "content": text},)))

    def answered(self, text: str) -> Conversation:
        *before, last = self.turns
        return replace(self, turns=(*before, (*last, {"role": "assistant", "content": text})))

    def unanswered(self) -> Conversation:
        """The same with the last question open again."""
        if not self.turns or self.turns[-1][0]["role"] != "user":
            raise UserError("nothing was asked yet")
        return replace(self, turns=(*self.turns[:-1], self.turns[-1][:1]))

    def undone(self) -> Conversation:
        """Without the last turn."""
        if not self.turns:
            raise UserError("nothing was said yet")
        return replace(self, turns=self.turns[:-1])


@dataclass(frozen=True)
class View:
    """What a model sees of a conversation: its prompt's ids, and how many of the oldest turns are left out."""

    ids: list[int]
    left_out: int


def view(conversation: Conversation, tokenizer: Tokenizer, room: int, *, refuse: bool = False) -> View:
    """The system prompt and as many of the newest turns as `room` tokens hold. Raises UserError where the last turn
    alone is too long; with `refuse`, wherever a turn would be left out."""

    def ids(left_out: int) -> list[int]:
        return encode_chat(tokenizer, conversation.messages(since=left_out))

    whole = ids(0)
    if len(whole) <= room:
        return View(whole, 0)
    if refuse:
        raise UserError(
            f"the conversation has {len(whole)} tokens, and beside an answer the context holds {room} "
            "(on_overflow: refuse; slide leaves the oldest turns out)"
        )
    count = len(conversation.turns)
    left_out = bisect_left(range(count), True, lo=1, key=lambda n: len(ids(n)) <= room) if count else 0
    if left_out >= count:
        raise UserError(
            f"this turn and the system prompt have {len(ids(max(0, count - 1)))} tokens, and beside an answer the "
            f"context holds {room}; shorten them, or max_new_tokens"
        )
    return View(ids(left_out), left_out)


def save_conversation(conversation: Conversation, path: Path) -> int:
    """Write it as the one line of a file that `gpt sft` learns from; how many turns were left out, because their
    answer is empty and so nothing to learn."""
    kept = tuple(turn for turn in conversation.turns if turn[-1]["role"] == "assistant" and turn[-1]["content"].strip())
    if not kept:
        raise UserError("no turn with an answer to save yet")
    messages = replace(conversation, turns=kept).messages()
    try:
        publish_text(path, json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    return len(conversation.turns) - len(kept)


def load_conversation(path: Path) -> Conversation:
    """The one conversation of a file in any format of `gpt sft`. Raises UserError, file and line first."""
    rows = list(read_jsonl(path))
    if len(rows) != 1:
        raise UserError(f"{path}: holds {len(rows)} conversations, and a chat goes on from one; give a file with one")
    [(number, row)] = rows
    try:
        return Conversation.of(parse_conversation(row))
    except UserError as error:
        raise UserError(f"{path}:{number}: {error}") from error

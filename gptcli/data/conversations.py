"""Conversations to learn from: the shapes people keep them in, as messages, and as ids with what is to be learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptcli.errors import UserError, nearest
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.chat_template import chat_pieces, special_in

ROLES = ("system", "user", "assistant", "tool")
Messages = list[dict[str, Any]]


def parse_conversation(row: dict[str, Any]) -> Messages:
    """{"messages"}, {"prompt", "response"} or Alpaca's {"instruction", "input", "output"} as messages that end with
    an answer. Raises UserError with what is wrong."""
    if "messages" in row:
        return _checked(row["messages"])
    if "prompt" in row or "response" in row:
        return _two_turns(_text(row, "prompt"), _text(row, "response"))
    if "instruction" in row:
        more = row.get("input") or ""
        if not isinstance(more, str):
            raise UserError(f"input: expected text, not {_kind(more)}")
        instruction = _text(row, "instruction")
        return _two_turns(f"{instruction}\n\n{more}" if more.strip() else instruction, _text(row, "output"))
    columns = ", ".join(row) or "none"
    raise UserError(
        f"holds no conversation: neither messages, nor prompt and response, nor instruction and output; its columns: "
        f"{columns} (-s data.columns='{{prompt: X, response: Y}}' names others)"
    )


def _two_turns(prompt: str, response: str) -> Messages:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _text(row: dict[str, Any], name: str) -> str:
    if name not in row:
        raise UserError(f"no {name!r} beside {', '.join(map(repr, row))}{nearest(name, list(row))}")
    if not isinstance(row[name], str):
        raise UserError(f"{name}: expected text, not {_kind(row[name])}")
    if not row[name].strip():
        raise UserError(f"{name}: is empty")
    return row[name]


def _checked(messages: Any) -> Messages:
    if not isinstance(messages, list) or not messages:
        raise UserError("messages: expected a list of {role, content}")
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        if not isinstance(message, dict):
            raise UserError(f"{place}: expected {{role, content}}, not {_kind(message)}")
        if "role" not in message:
            raise UserError(f"{place}: no role ({' | '.join(ROLES)})")
        if message["role"] not in ROLES:
            hint = nearest(str(message["role"]), ROLES) or f"; expected {' | '.join(ROLES)}"
            raise UserError(f"{place}.role: {message['role']!r} is no role{hint}")
        if not isinstance(message.get("content"), str):
            raise UserError(f"{place}.content: expected text, not {_kind(message.get('content'))}")
        if message["role"] == "assistant" and not message["content"].strip():
            raise UserError(f"{place}.content: the answer is empty")
    if messages[-1]["role"] != "assistant":
        raise UserError(f"messages: ends with {messages[-1]['role']!r}, so there is no answer to learn")
    return messages


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


@dataclass(frozen=True)
class Encoded:
    """A conversation's ids, which of them are to be learned, and where each answer's tokens begin and end."""

    ids: np.ndarray  # (L,) int32
    trained: np.ndarray  # (L,) bool
    answers: tuple[tuple[int, int], ...]
    place: str = ""  # FILE:LINE

    def __len__(self) -> int:
        return len(self.ids)


class ConversationEncoder:
    """Messages -> ids, turn by turn: what comes before an answer and the answer are encoded apart, so that no merge
    crosses the border, and a model that is asked later sees the ids that it learned from.

    plain: a prompt and its response as they are, with end-of-text after it, in no template.
    """

    def __init__(self, tokenizer: Tokenizer, train_on: str = "assistant", *, plain: bool = False) -> None:
        self.tokenizer, self._train_on, self._plain = tokenizer, train_on, plain
        assert tokenizer.eos_id is not None
        self._stop = tokenizer.eos_id

    def encode(self, messages: Messages) -> Encoded:
        """Raises UserError for what would teach nonsense."""
        ids: list[int] = []
        answers: list[tuple[int, int]] = []
        for piece, is_answer in self._pieces(messages):
            new = self.tokenizer.encode(piece, parse_special=not self._plain)
            if is_answer and self._plain:
                new.append(self._stop)
            if is_answer:
                answers.append((len(ids), len(ids) + self._answer_length(new)))
            ids += new
        self._check(ids, answers)
        return Encoded(np.array(ids, np.int32), self._mask(len(ids), answers), tuple(answers))

    def _pieces(self, messages: Messages) -> Sequence[tuple[str, bool]]:
        if self._plain:
            if [m["role"] for m in messages] != ["user", "assistant"]:
                raise UserError("sft.template none takes a prompt and a response, and this has other turns")
            return [(messages[0]["content"], False), (messages[1]["content"], True)]
        for number, message in enumerate(messages):
            if token := special_in(self.tokenizer, message["content"]):
                raise UserError(f"messages[{number}].content: holds {token}, which would be read as that token")
        return chat_pieces(self.tokenizer, messages)

    def _answer_length(self, ids: list[int]) -> int:
        """Up to the first special token after some text: the end of the turn. What follows it is the template's."""
        special = self.tokenizer.special_ids
        begun = next((n for n, i in enumerate(ids) if i not in special), len(ids))
        return next((n + 1 for n in range(begun, len(ids)) if ids[n] in special), len(ids))

    def _mask(self, length: int, answers: list[tuple[int, int]]) -> np.ndarray:
        trained = np.zeros(length, bool)
        if self._train_on == "all":
            trained[1:] = True
        for begin, end in answers if self._train_on == "assistant" else answers[-1:]:
            trained[begin:end] = True
        trained[0] = False  # nothing comes before it
        return trained

    def _check(self, ids: list[int], answers: list[tuple[int, int]]) -> None:
        tokenizer = self.tokenizer
        if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_id:
            raise UserError(f"begins with {tokenizer.special['bos']} twice; the chat template should write it once")
        if not any(end > begin for begin, end in answers):
            raise UserError("nothing in it is to be learned")
        for _, end in answers:
            if (last := ids[end - 1]) != self._stop:
                stop = tokenizer.special["eos"]
                ends = tokenizer.decode([last]) if last in tokenizer.special_ids else None
                what = f"answers end with {ends}" if ends else "the chat template writes no special token after answers"
                todo = f"-s 'sft.stop_token={ends}'" if ends else f"end them with {{{{ eos_token }}}} ({stop}) in it"
                raise UserError(f"{what}, but text ends at {stop}, which would not be learned; {todo}")

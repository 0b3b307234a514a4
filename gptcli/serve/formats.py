"""OpenAI's two ways to write an answer, whole and in chunks."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from gptcli.generate import Completion
from gptcli.serve.logprobs import TokenView, chat_logprobs, completion_logprobs

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class Format(ABC):
    """One answer's identity, and the shapes that are common to both APIs."""

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, model: str, *, with_logprobs: bool, with_usage: bool) -> None:
        self.with_logprobs, self.with_usage = with_logprobs, with_usage
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        return {**self._head, "object": self.kind, "choices": list(choices), "usage": usage}

    def choice(self, index: int, text: str, tokens: Sequence[TokenView], reason: str) -> dict[str, Any]:
        return {"index": index, **self._text(text), "logprobs": self._logprobs(tokens), "finish_reason": reason}

    def opening(self, index: int) -> str:
        """What a choice's chunks begin with."""
        return ""

    def chunk(self, index: int, text: str, tokens: Sequence[TokenView]) -> str:
        return self._event([{"index": index, **self._delta(text), "logprobs": self._logprobs(tokens)}])

    def end(self, index: int, reason: str) -> str:
        return self._event([{"index": index, **self._delta(""), "logprobs": None, "finish_reason": reason}])

    def closing(self, usage: dict[str, int]) -> str:
        return (self._event([], usage) if self.with_usage else "") + "data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> str:
        choices = [{"finish_reason": None, **choice} for choice in choices]
        extra = {"usage": usage} if self.with_usage else {}
        return sse({**self._head, "object": self.chunk_kind, "choices": choices, **extra})

    def _logprobs(self, tokens: Sequence[TokenView]) -> dict[str, Any] | None:
        return self._shape(tokens) if self.with_logprobs else None

    @abstractmethod
    def _text(self, text: str) -> dict[str, Any]:
        """A whole answer's text."""

    @abstractmethod
    def _delta(self, text: str) -> dict[str, Any]:
        """A chunk's text."""

    @abstractmethod
    def _shape(self, tokens: Sequence[TokenView]) -> dict[str, Any]:
        """The tokens' log-probabilities."""


class CompletionFormat(Format):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def _text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    _delta = _text

    def _shape(self, tokens: Sequence[TokenView]) -> dict[str, Any]:
        return completion_logprobs(tokens)


class ChatFormat(Format):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> str:
        return self._event([{"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None}])

    def _text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def _shape(self, tokens: Sequence[TokenView]) -> dict[str, Any]:
        return chat_logprobs(tokens)


def sse(payload: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {_ENCODER.encode(payload)}\n\n"


def usage_of(prompt_tokens: int, completions: Sequence[Completion]) -> dict[str, int]:
    new = sum(len(completion.ids) for completion in completions)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": new, "total_tokens": prompt_tokens + new}


def reason_of(completion: Completion) -> str:
    """OpenAI does not tell end-of-text from a stop string."""
    return "length" if completion.finish_reason == "length" else "stop"

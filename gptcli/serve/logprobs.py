"""Log-probabilities as OpenAI's two APIs write them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gptcli.generate.scheduler import Token
from gptcli.tokenizer import StreamDecoder, Tokenizer
from gptcli.tokenizer.stream import REPLACEMENT
from gptcli.tokenizer.texts import TokenTexts


@dataclass(frozen=True)
class TokenView:
    """A token as others shall see it; offset: the characters that came before it. The first of all has no logprob."""

    text: str
    offset: int
    logprob: float | None
    top: Sequence[tuple[str, float]]


class TokenViews:
    """Views of the tokens of one text, in their order."""

    def __init__(self, tokenizer: Tokenizer, texts: TokenTexts, context: Sequence[int] = ()) -> None:
        self._texts, self._decoder = texts, StreamDecoder(tokenizer, context=context)
        self._offset = 0

    def push(self, token: Token) -> TokenView:
        top = [(self._texts.text(i), logprob) for i, logprob in token.top]
        view = TokenView(self._texts.text(token.id), self._offset, token.logprob, top)
        self._offset += len(self._decoder.push(token.id))
        return view


def completion_logprobs(tokens: Iterable[TokenView]) -> dict[str, Any]:
    tokens = list(tokens)
    return {
        "tokens": [t.text for t in tokens],
        "token_logprobs": [t.logprob for t in tokens],
        # parts of characters look alike: of those the likeliest is told
        "top_logprobs": [dict(reversed(t.top)) if t.logprob is not None else None for t in tokens],
        "text_offset": [t.offset for t in tokens],
    }


def chat_logprobs(tokens: Iterable[TokenView]) -> dict[str, Any]:
    rows = [{**_chat_token(t.text, t.logprob), "top_logprobs": [_chat_token(*top) for top in t.top]} for t in tokens]
    return {"content": rows, "refusal": None}


def _chat_token(text: str, logprob: float | None) -> dict[str, Any]:
    """bytes are null where a token alone is no whole character."""
    whole = REPLACEMENT not in text
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}

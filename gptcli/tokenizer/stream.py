"""Decoding token by token, never half a character."""

from __future__ import annotations

from collections.abc import Sequence

from gptcli.tokenizer.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
CONTEXT = 8


class StreamDecoder:
    """`push` ids one by one, print what it returns, `flush` at the end: the joined chunks equal the full decode.

    Bytes that are no character yet decode to U+FFFD at the end: to one, or with SentencePiece to one for each byte.
    They can still change, so they are held back. Ids before the last clean place are context, so each push decodes a
    short tail. `context` are ids that the text follows: some tokenizers drop a space where nothing precedes it.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, context: Sequence[int] = ()) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        self._window = list(context[-CONTEXT:])  # ids since the last clean place but one
        self._clean = len(self._window)  # ids of the window up to the last clean place
        self._said = len(self._decode())  # characters of the window's text that were returned

    def push(self, token: int) -> str:
        """The text that this token completes, possibly empty."""
        self._window.append(token)
        text = self._decode()
        if text.endswith(REPLACEMENT):
            return self._emit(text, len(text.rstrip(REPLACEMENT)))
        chunk = self._emit(text, len(text))
        if not chunk:  # a special token that is left out is no context: what follows may need the one before
            self._window.pop()
            return ""
        self._window, self._clean = self._window[self._clean :], len(self._window) - self._clean
        self._said = len(self._decode())
        return chunk

    def flush(self) -> str:
        """What is still held back, half characters as U+FFFD."""
        text = self._decode()
        return self._emit(text, len(text))

    def _emit(self, text: str, end: int) -> str:
        chunk, self._said = text[self._said : end], max(self._said, end)
        return chunk

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special=self._skip)

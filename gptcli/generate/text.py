"""From tokens to text as it may be shown: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from gptcli.tokenizer import StreamDecoder, Tokenizer


class TextStream:
    """Feeds on tokens, gives text. Held back: half characters, and an end that may begin a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, context: Sequence[int] = ()) -> None:
        self._decoder = StreamDecoder(tokenizer, context=context)
        self._stop = [s for s in stop if s]
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that is certain after this token. Sets `stopped` when a stop string was met; it is cut off."""
        return self._release(self._decoder.push(token))

    def flush(self) -> str:
        """The rest, when no token will follow."""
        chunk = self._release(self._decoder.flush())
        rest, self._held = self._held, ""
        self.text += rest
        return chunk + rest

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        self._held += new
        cut = min((at for at in map(self._held.find, self._stop) if at >= 0), default=-1)
        if cut >= 0:
            self.stopped = True
            chunk, self._held = self._held[:cut], ""
        else:
            keep = max((_overlap(self._held, s) for s in self._stop), default=0)
            end = len(self._held) - keep
            chunk, self._held = self._held[:end], self._held[end:]
        self.text += chunk
        return chunk


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0

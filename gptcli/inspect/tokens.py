"""Which token of a text is meant."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gptcli.errors import UserError
from gptcli.tokenizer import Tokenizer


def find_word(tokenizer: Tokenizer, ids: Sequence[int], word: str) -> int:
    """The last token of the last place where `word` stands: that token has seen all of the word."""
    text = tokenizer.decode(ids)
    places = [m.span() for m in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text)]
    places = places or [m.span() for m in re.finditer(re.escape(word), text)]  # inside a word, or in Chinese
    if not word or not places:
        raise UserError(f"{word!r} is not in the text {text!r}")
    start, end = places[-1]
    return next(i for i in range(len(ids)) if tokenizer.decode(ids[: i + 1])[start:end] == word)

"""How single tokens are shown, and which token of a text is meant."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gptcli.errors import UserError
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.build import byte_alphabet

REPLACEMENT = "\ufffd"


class TokenTexts:
    """The text that a token adds inside a text, where a space that belongs to it shows."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._alphabet = {char: byte for byte, char in enumerate(byte_alphabet())}
        self._anchor = self._find_anchor()

    def text(self, id: int) -> str:
        """U+FFFD stands for bytes that are no character alone."""
        if self._tokenizer.backend.id_to_token(id) is None:
            return f"<{id}>"  # a row that pads the vocabulary
        if self._anchor is None:
            return self._tokenizer.decode([id])
        ids, anchor = self._anchor
        return self._tokenizer.decode([*ids, id, *ids])[len(anchor) : -len(anchor)]

    def shown(self, id: int) -> str:
        """On one line and unmistakable: ␣ for a space, \\n for a newline, \\xe4 for a byte of a character."""
        text = self.text(id)
        if REPLACEMENT in text and (data := self._bytes(id)) is not None:
            return "".join(f"\\x{byte:02x}" for byte in data)
        return visible(text)

    def _find_anchor(self) -> tuple[list[int], str] | None:
        """A token whose text its neighbours do not change, to put around others."""
        for id in range(self._tokenizer.vocab_size):
            text = self._tokenizer.decode([id])
            plain = text and text.isprintable() and REPLACEMENT not in text and not text.isspace()
            if plain and id not in self._tokenizer.special_ids and self._tokenizer.decode([id, id]) == 2 * text:
                return [id], text
        return None

    def _bytes(self, id: int) -> bytes | None:
        """The bytes a token stands for, in a byte-level BPE or as SentencePiece's <0xE4>."""
        piece = self._tokenizer.backend.id_to_token(id) or ""
        if single := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(single[1])
        if all(char in self._alphabet for char in piece):
            return bytes(self._alphabet[char] for char in piece)
        return None


def visible(text: str) -> str:
    return "".join("␣" if char == " " else char if _plain(char) else _escape(char) for char in text)


def _plain(char: str) -> bool:
    return char.isprintable() and char != "\\"


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode()


def find_word(tokenizer: Tokenizer, ids: Sequence[int], word: str) -> int:
    """The last token of the last place where `word` stands: that token has seen all of the word."""
    text = tokenizer.decode(ids)
    places = [m.span() for m in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text)]
    places = places or [m.span() for m in re.finditer(re.escape(word), text)]  # inside a word, or in Chinese
    if not word or not places:
        raise UserError(f"{word!r} is not in the text {text!r}")
    start, end = places[-1]
    return next(i for i in range(len(ids)) if tokenizer.decode(ids[: i + 1])[start:end] == word)

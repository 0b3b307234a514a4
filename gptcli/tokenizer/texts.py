"""How single tokens are shown."""

from __future__ import annotations

from gptcli.tokenizer.spelling import BYTE, BYTE_OF
from gptcli.tokenizer.stream import REPLACEMENT
from gptcli.tokenizer.tokenizer import Tokenizer


class TokenTexts:
    """The text that a token adds inside a text, where a space that belongs to it shows."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._anchor = self._find_anchor()

    def text(self, id: int) -> str:
        """U+FFFD stands for bytes that are no character alone; a row that pads the vocabulary adds nothing."""
        decode = self._tokenizer.decode
        if self._anchor is None:  # the first of its kind may lack the space before it, the second does not
            return decode([id, id])[len(decode([id])) :]
        anchor, around = self._anchor
        return decode([anchor, id, anchor])[len(around) : -len(around)]

    def shown(self, id: int) -> str:
        """On one line and unmistakable: ␣ for a space, \\n for a newline, \\xe4 for a byte of a character."""
        piece = self._tokenizer.backend.id_to_token(id)
        if piece is None:
            return f"<{id}>"
        text = self.text(id)
        if REPLACEMENT in text and (data := _bytes(piece)) is not None:
            return "".join(f"\\x{byte:02x}" for byte in data)
        return visible(text)

    def _find_anchor(self) -> tuple[int, str] | None:
        """A token whose text its neighbours do not change, to put around others; and that text."""
        for id in range(self._tokenizer.vocab_size):
            text = self._tokenizer.decode([id])
            plain = text and text.isprintable() and REPLACEMENT not in text and not text.isspace()
            if plain and id not in self._tokenizer.special_ids and self._tokenizer.decode([id, id]) == 2 * text:
                return id, text
        return None


def visible(text: str) -> str:
    return "".join("␣" if char == " " else char if _plain(char) else _escape(char) for char in text)


def _plain(char: str) -> bool:
    return char.isprintable() and char != "\\"


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode()


def _bytes(piece: str) -> bytes | None:
    """What a token stands for, in a byte-level BPE or as SentencePiece's <0xE4>."""
    if byte := BYTE.fullmatch(piece):
        return bytes.fromhex(byte[1])
    return bytes(BYTE_OF[char] for char in piece) if all(char in BYTE_OF for char in piece) else None

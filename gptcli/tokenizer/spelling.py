"""The bytes that each token stands for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from gptcli.errors import UserError
from gptcli.tokenizer.build import byte_alphabet
from gptcli.tokenizer.tokenizer import Tokenizer

SPACE = "▁"  # SentencePiece's
BYTE_OF = {char: byte for byte, char in enumerate(byte_alphabet())}
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: Tokenizer) -> dict[int, bytes]:
    """id -> bytes of every token that is not special. Raises UserError where a token's text hangs on its neighbours,
    as with GPT-1's, whose words end in a space unless they are the last."""
    kinds = _decoder_kinds(json.loads(tokenizer.backend.to_str()).get("decoder"))
    spell: Callable[[str], bytes]
    if "ByteLevel" in kinds:
        spell = _byte_level
    elif tokenizer.alphabet is not None:
        spell = str.encode
    elif "ByteFallback" in kinds:
        spell = _byte_fallback
    elif "Metaspace" in kinds:
        spell = _metaspace
    else:
        raise UserError(
            "regex, choices and json_schema need a tokenizer whose tokens spell text by themselves: byte-level, "
            "SentencePiece's or characters; this one is none of them"
        )
    vocab = tokenizer.backend.get_vocab(with_added_tokens=True)
    return {i: spell(token) for token, i in vocab.items() if i not in tokenizer.special_ids}


def _byte_level(token: str) -> bytes:
    known = all(char in BYTE_OF for char in token)  # a token added later is its own text
    return bytes(BYTE_OF[char] for char in token) if known else token.encode()


def _byte_fallback(token: str) -> bytes:
    byte = BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else _metaspace(token)


def _metaspace(token: str) -> bytes:
    return token.replace(SPACE, " ").encode()


def _decoder_kinds(decoder: dict[str, Any] | None) -> set[str]:
    """The types of a decoder and of those that it is a sequence of."""
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*map(_decoder_kinds, decoder.get("decoders", [])))

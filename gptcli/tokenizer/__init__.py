"""Text <-> token ids. Everything is one `tokenizer.json`, whatever the scheme. No torch."""

from gptcli.tokenizer.stream import StreamDecoder
from gptcli.tokenizer.tokenizer import Tokenizer

__all__ = ["StreamDecoder", "Tokenizer"]

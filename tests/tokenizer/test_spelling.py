"""The bytes of tokens: put together they are the text, for every kind that spells by itself."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers import decoders, models

from gptcli.errors import UserError
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.build import byte_tokenizer, char_tokenizer, train_bpe
from gptcli.tokenizer.spelling import token_bytes

TEXT = "the été, the 🦓 and\n\tthe 日本"


@pytest.mark.parametrize("make", [byte_tokenizer, lambda: train_bpe([TEXT] * 3, 290), lambda: char_tokenizer([TEXT])])
def test_bytes_of_tokens_are_the_text(make) -> None:
    tokenizer = make()
    spelled = token_bytes(tokenizer)
    assert tokenizer.eos_id not in spelled
    assert b"".join(spelled[i] for i in tokenizer.encode(TEXT)) == TEXT.encode()


def test_an_added_token_is_its_own_text() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend.add_tokens([tokenizers.AddedToken("<a b>", special=False)])
    assert token_bytes(tokenizer)[257] == b"<a b>"


def test_sentencepieces_spaces_and_bytes() -> None:
    vocab = {"▁the": 0, "▁": 1, "<0xF0>": 2, "x": 3}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    assert token_bytes(Tokenizer(backend, {})) == {0: b" the", 1: b" ", 2: b"\xf0", 3: b"x"}
    backend.decoder = decoders.Metaspace()
    assert token_bytes(Tokenizer(backend, {}))[2] == b"<0xF0>"


def test_words_that_depend_on_what_follows_are_refused() -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a</w>": 0, "ab": 1}, merges=[], end_of_word_suffix="</w>"))
    backend.decoder = decoders.BPEDecoder("</w>")
    with pytest.raises(UserError, match="tokens spell text by themselves"):
        token_bytes(Tokenizer(backend, {}))

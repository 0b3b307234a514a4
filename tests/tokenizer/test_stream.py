"""Decoding token by token: the joined chunks are the full decode, and no chunk ends in half a character."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models

from gptcli.tokenizer import StreamDecoder, Tokenizer
from gptcli.tokenizer.build import byte_tokenizer, char_tokenizer, train_bpe
from gptcli.tokenizer.stream import REPLACEMENT

TEXT = "the cat and the hat  # 语言模型读文字 🙂🙃🙂 naïve café\n" * 20
BYTES, BPE = byte_tokenizer(), train_bpe([TEXT], 300)
OPEN = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])


def chunks(tokenizer, ids, **options):
    stream = StreamDecoder(tokenizer, **options)
    return [*(stream.push(i) for i in ids), stream.flush()]


@OPEN
@pytest.mark.parametrize("skip", [True, False])
@given(numbers=st.lists(st.integers(0, 10**6)))
@example(numbers=[0xE4, 256, 0xBD, 0xA0])  # a character around an end-of-text
@example(numbers=[0xF0, 0x9F, 0x98, 0x41])  # one that never ends
@example(numbers=[0xEF, 0xBF, 0xBD, 0x41])  # U+FFFD itself
def test_joined_chunks_are_the_full_decode(tokenizer, skip, numbers):
    ids = [n % tokenizer.vocab_size for n in numbers]
    assert "".join(chunks(tokenizer, ids, skip_special=skip)) == tokenizer.decode(ids, skip_special=skip)


@OPEN
@given(text=st.text(alphabet=st.characters(exclude_characters=REPLACEMENT, exclude_categories=["Cs"])))
@example(text="语言🙂é")
def test_valid_text_never_shows_a_half_character(tokenizer, text):
    shown = chunks(tokenizer, tokenizer.encode(text))
    assert REPLACEMENT not in "".join(shown)
    assert "".join(shown) == text
    assert shown[-1] == ""  # nothing was left to flush


@given(st.text())
def test_a_character_is_said_with_its_last_byte(text):
    shown = chunks(BYTES, BYTES.encode(text))
    expected = []
    for char in text:
        expected += [""] * (len(char.encode()) - 1) + [char]
    if REPLACEMENT in text:  # cannot be told from a half character before the next one
        assert "".join(shown) == text
    else:
        assert shown == [*expected, ""]


def test_half_a_character_comes_out_at_the_end():
    assert chunks(BYTES, "é".encode()[:1]) == ["", REPLACEMENT]


def test_special_tokens_are_left_out_unless_wanted():
    ids = [*BYTES.encode("a"), BYTES.eos_id, *BYTES.encode("b")]
    assert chunks(BYTES, ids) == ["a", "", "b", ""]
    assert chunks(BYTES, ids, skip_special=False) == ["a", "<|endoftext|>", "b", ""]


def test_characters_stream_at_once():
    tokenizer = char_tokenizer(["ab语"])
    assert chunks(tokenizer, tokenizer.encode("语a")) == ["语", "a", ""]


@OPEN
def test_streams_do_not_share_state(tokenizer):
    one, two = StreamDecoder(tokenizer), StreamDecoder(tokenizer)
    ids = tokenizer.encode("语")
    for i in ids[:-1]:
        assert one.push(i) == ""
    assert two.flush() == ""
    assert one.push(ids[-1]) == "语"


def test_characters_out_of_byte_tokens_are_shown_whole():
    """SentencePiece's decoder gives a U+FFFD for each byte of a run that ends in half a character."""
    backend = tokenizers.Tokenizer(models.BPE(vocab={f"<0x{b:02X}>": b for b in range(256)}, merges=[]))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    assert "".join(chunks(Tokenizer(backend, {}), list("🙂🙂é!".encode()))) == "🙂🙂é!"

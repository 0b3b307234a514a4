"""Tokens as they are shown."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.build import byte_tokenizer, char_tokenizer, train_bpe
from gptcli.tokenizer.texts import TokenTexts, visible


def sentencepiece_like() -> Tokenizer:
    """Words after a ▁, bytes as <0x..>, a leading space that decoding drops: Llama's way."""
    words = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁cat", "s", "."]
    backend = tokenizers.Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return Tokenizer(backend)


def test_spaces_and_half_characters_show() -> None:
    bpe = train_bpe(["the cat sat, the cat ran\n" * 9], 300)
    texts = TokenTexts(bpe)
    (cat,) = bpe.encode(" cat")
    assert (texts.text(cat), texts.shown(cat)) == (" cat", "␣cat")
    of_bytes = TokenTexts(byte_tokenizer())
    assert [of_bytes.shown(i) for i in byte_tokenizer().encode("é\n")] == ["\\xc3", "\\xa9", "\\n"]
    assert texts.shown(bpe.eos_id) == "<|endoftext|>"
    assert (texts.text(99999), texts.shown(99999)) == ("", "<99999>")  # a row that pads the vocabulary


def test_sentencepiece_tokens_keep_their_space() -> None:
    tokenizer = sentencepiece_like()
    texts = TokenTexts(tokenizer)
    assert tokenizer.decode([258]) == "cat"
    assert (texts.text(258), texts.shown(258), texts.shown(257)) == (" cat", "␣cat", "␣")
    assert texts.shown(1 + 0xE4) == "\\xe4"


def test_texts_of_all_tokens_join_to_the_text() -> None:
    text = "the cat sat, été 你好 🙂\n"
    for tokenizer in (train_bpe([text * 9], 290), char_tokenizer([text])):
        texts = TokenTexts(tokenizer)
        pieces = [texts.text(i) for i in tokenizer.encode(text)]
        if not any("\ufffd" in piece for piece in pieces):
            assert "".join(pieces) == text


def test_visible_is_one_unmistakable_line() -> None:
    assert visible("a b\t\n\\\u200b\x1b你🙂") == "a␣b\\t\\n\\\\\\u200b\\x1b你🙂"


def test_words_that_decoding_parts_have_the_space_before_them() -> None:
    """No token keeps its text whatever stands beside it, so none can be put around others."""
    backend = tokenizers.Tokenizer(models.WordLevel({"the": 0, "cat": 1}, unk_token="the"))
    texts = TokenTexts(Tokenizer(backend))
    assert (texts.text(0), texts.shown(1)) == (" the", "␣cat")


def test_a_real_llama(shared_data: Path, tmp_path: Path) -> None:
    from gptcli.exchange.transfer import import_model

    import_model(str(shared_data / "weights/stories260K/stories260K.bin"), tmp_path / "m", tokenizer=None)
    tokenizer = Tokenizer.load(tmp_path / "m")
    texts = TokenTexts(tokenizer)
    assert [texts.shown(i) for i in tokenizer.encode("Once upon 你")] == [
        "␣Once",
        "␣upon",
        "␣",
        "\\xe4",
        "\\xbd",
        "\\xa0",
    ]

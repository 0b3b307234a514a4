"""Making tokenizers: byte-level BPE trained on text, GPT-2's from its files, bytes, characters."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gptcli.errors import UserError
from gptcli.tokenizer.tokenizer import END_OF_TEXT, Tokenizer

BYTES = 256


def train_bpe(texts: Iterable[str], vocab_size: int, *, progress: bool = False) -> Tokenizer:
    """Byte-level BPE with GPT-2's pre-tokenizer; `<|endoftext|>` is the last of at most `vocab_size` ids (a short text
    has fewer pairs to merge)."""
    if vocab_size < BYTES + 1:
        raise UserError(f"tokenizer bpe:{vocab_size}: a byte-level BPE has at least {BYTES + 1} tokens")
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=progress,
    )
    backend.train_from_iterator(texts, trainer)
    return _with_end_of_text(backend)


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are the bytes, 256 is end-of-text."""
    vocab = {char: i for i, char in enumerate(byte_alphabet())}
    return _with_end_of_text(_byte_level(models.BPE(vocab=vocab, merges=[]), use_regex=False))


def char_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """One id per character seen, in order of code point, then end-of-text. A character not seen is an error
    when encoding (see `check_encodable`)."""
    seen: set[str] = set()
    for text in texts:
        seen.update(text)
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(seen))}, merges=[]))
    backend.decoder = decoders.Fuse()
    return _with_end_of_text(backend)


def gpt2_from_files(folder: str | Path) -> Tokenizer:
    """OpenAI's encoder.json + vocab.bpe, or the same as vocab.json + merges.txt."""
    folder = Path(folder)
    for vocab_name, merges_name in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        if (folder / vocab_name).is_file() and (folder / merges_name).is_file():
            break
    else:
        raise UserError(f"{folder}: holds no tokenizer.json, encoder.json + vocab.bpe or vocab.json + merges.txt")
    try:
        vocab = json.loads((folder / vocab_name).read_text("utf-8"))
        lines = (folder / merges_name).read_text("utf-8").split("\n")
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        merges = [(left, right) for left, right in pairs]
        backend = _byte_level(models.BPE(vocab=vocab, merges=merges))
    except (ValueError, OSError) as error:
        raise UserError(f"{folder}: {vocab_name} and {merges_name} do not make a BPE ({error})") from error
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{folder}: {vocab_name} and {merges_name} do not make a BPE ({error})") from error
    if END_OF_TEXT in vocab:
        backend.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return Tokenizer(backend)


def byte_alphabet() -> list[str]:
    """The printable stand-ins of bytes 0 to 255, in order (GPT-2's bytes_to_unicode)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    shifted = iter(range(BYTES, 2 * BYTES))
    return [chr(b) if b in printable else chr(next(shifted)) for b in range(BYTES)]


def _byte_level(model: models.Model, *, use_regex: bool = True) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    return backend


def _with_end_of_text(backend: tokenizers.Tokenizer) -> Tokenizer:
    backend.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return Tokenizer(backend)

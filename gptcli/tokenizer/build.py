"""Making tokenizers: byte-level BPE trained on text, GPT-2's and GPT-1's from their files, bytes, characters."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gptcli.errors import UserError
from gptcli.tokenizer import gpt1
from gptcli.tokenizer.tokenizer import END_OF_TEXT, Tokenizer

BYTES = 256
MOST_TOKENS = 1 << 24
LONGEST = 512
LONG_RUN = re.compile(rf"(?<!\S)\S{{{LONGEST + 1},}}")
UNKNOWN, END_OF_WORD = "<unk>", "</w>"
# The files of a vocabulary and its merges: OpenAI's for GPT-2, Hugging Face's, OpenAI's for GPT-1.
PAIRS = (
    ("encoder.json", "vocab.bpe"),
    ("vocab.json", "merges.txt"),
    ("encoder_bpe_40000.json", "vocab_40000.bpe"),
)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's pre-tokenizer; `<|endoftext|>` is the last of at most `vocab_size` ids (a short text
    has fewer pairs to merge)."""
    if vocab_size < BYTES + 1:
        raise UserError(f"tokenizer bpe:{vocab_size}: a byte-level BPE has at least {BYTES + 1} tokens")
    if vocab_size > MOST_TOKENS:
        raise UserError(f"tokenizer bpe:{vocab_size}: at most {MOST_TOKENS:,} tokens")
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    backend.train_from_iterator((in_pieces(text) for text in texts), trainer)
    return _with_end_of_text(backend)


def in_pieces(text: str) -> str:
    """The text with line breaks in what is longer than any word (a genome, a blob): the time that counting pairs takes
    grows with the square of it."""
    return LONG_RUN.sub(lambda run: "\n".join(run[0][i : i + LONGEST] for i in range(0, len(run[0]), LONGEST)), text)


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are the bytes, 256 is end-of-text."""
    vocab = {char: i for i, char in enumerate(byte_alphabet())}
    return _with_end_of_text(_byte_level(models.BPE(vocab=vocab, merges=[]), use_regex=False))


def char_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """One id per character seen, in order of code point, then end-of-text. A character not seen is an error
    when encoding (see `Tokenizer.encode`)."""
    seen: set[str] = set()
    for text in texts:
        seen.update(text)
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(seen))}, merges=[]))
    backend.decoder = decoders.Fuse()
    return _with_end_of_text(backend)


def gpt2_from_files(folder: str | Path) -> Tokenizer:
    """OpenAI's encoder.json + vocab.bpe, or the same as vocab.json + merges.txt."""
    backend = _byte_level(_bpe(Path(folder)))
    return Tokenizer(backend) if backend.token_to_id(END_OF_TEXT) is None else _with_end_of_text(backend)


def gpt1_from_files(folder: str | Path) -> Tokenizer:
    """OpenAI's encoder_bpe_40000.json + vocab_40000.bpe, or the same as vocab.json + merges.txt.

    `<unk>` stands for a character that was in none of GPT-1's books. No token ends a text."""
    backend = tokenizers.Tokenizer(_bpe(Path(folder), unk_token=UNKNOWN, end_of_word_suffix=END_OF_WORD))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")  # not at any white space: a newline is a word
    backend.decoder = decoders.BPEDecoder(suffix=END_OF_WORD)
    backend.add_special_tokens([tokenizers.AddedToken(UNKNOWN, special=True, normalized=False)])
    return Tokenizer(backend, {"unk": UNKNOWN}, gpt1.at_hand())


def holds_gpt1(folder: Path) -> bool:
    """Whether the folder has GPT-1's pair of files: its vocabulary alone holds a newline that is a word."""
    found = _find_pair(folder)
    return found is not None and json.dumps("\n" + END_OF_WORD) in found[0].read_text("utf-8", "replace")


def _find_pair(folder: Path) -> tuple[Path, Path] | None:
    pairs = ((folder / vocab, folder / merges) for vocab, merges in PAIRS)
    return next((pair for pair in pairs if all(file.is_file() for file in pair)), None)


def _bpe(folder: Path, **options: str) -> models.BPE:
    """The folder's pair of files as a BPE. Raises UserError if they make none."""
    found = _find_pair(folder)
    if found is None:
        raise UserError(f"{folder}: holds no tokenizer.json, nor {' nor '.join(map(' + '.join, PAIRS))}")
    vocab_file, merges_file = found
    try:
        vocab = json.loads(vocab_file.read_text("utf-8"))
        lines = merges_file.read_text("utf-8").split("\n")
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        return models.BPE(vocab=vocab, merges=[(left, right) for left, right in pairs], **options)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{folder}: {vocab_file.name} and {merges_file.name} do not make a BPE ({error})") from error


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

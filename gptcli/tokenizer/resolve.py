"""From a recipe's `tokenizer:` value to a tokenizer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path

from gptcli import hub
from gptcli.errors import UserError, nearest
from gptcli.tokenizer import gpt1
from gptcli.tokenizer.build import (
    byte_tokenizer,
    char_tokenizer,
    gpt1_from_files,
    gpt2_from_files,
    holds_gpt1,
    train_bpe,
)
from gptcli.tokenizer.tokenizer import Tokenizer

GPT1_VOCAB, GPT2_VOCAB = 40478, 50257
NAMES = ("gpt1", "gpt2", "bytes", "char", "bpe:SIZE")


def needs_text(spec: str) -> bool:
    """Whether this tokenizer is made from the source's own text."""
    return spec == "char" or spec.startswith("bpe:")


def known_vocab_size(spec: str | None) -> int | None:
    """The vocabulary a spec stands for, as far as its name says."""
    if spec == "gpt1":
        return GPT1_VOCAB
    if spec == "gpt2":
        return GPT2_VOCAB
    if spec == "bytes":
        return 257
    if spec and spec.startswith("bpe:") and spec[4:].isdigit():
        return int(spec[4:])
    return None


def fingerprint(spec: str) -> str:
    """Changes whenever the tokenizer that `spec` names does, the text that it is made from apart."""
    path = Path(spec).expanduser()
    if spec == "bytes" or needs_text(spec):
        return spec
    if path.exists():
        return from_path(path).hash
    if spec == "gpt2":
        return "gpt2 of the hub" if gpt2_file() else "gpt2 stand-in"
    return f"gpt1 as {gpt1.at_hand()}" if spec == "gpt1" else spec


def resolve_tokenizer(spec: str, texts: Callable[[], Iterable[str]], *, say: Callable[[str], None]) -> Tokenizer:
    """The tokenizer that `spec` names: gpt1 | gpt2 | bytes | char | bpe:SIZE | a path; `texts` gives the training
    text."""
    if spec == "bytes":
        return byte_tokenizer()
    if spec == "char":
        return char_tokenizer(texts())
    if spec.startswith("bpe:"):
        size = spec.removeprefix("bpe:")
        if not size.isdigit():
            raise UserError(f"tokenizer {spec}: write bpe:SIZE, such as bpe:8192")
        return train_bpe(texts(), int(size))
    path = Path(spec).expanduser()
    if path.exists():
        return _noted(from_path(path), say)
    if spec == "gpt1":
        return _noted(_gpt1(), say)
    if spec == "gpt2":
        return _gpt2(texts, say)
    hint = nearest(spec, NAMES) or f"; expected {' | '.join(NAMES)} | a path"
    raise UserError(f"tokenizer {spec}: no such file or name{hint}")


def from_path(path: Path) -> Tokenizer:
    """A tokenizer.json, or a folder with one, or with GPT-2's or GPT-1's pair of files.

    GPT-1's pair comes before a tokenizer.json beside it, which cannot say how GPT-1 split text."""
    if path.is_dir() and holds_gpt1(path):
        return gpt1_from_files(path)
    if path.is_dir() and not (path / "tokenizer.json").is_file():
        latest = path / "latest"
        return Tokenizer.load(latest) if (latest / "tokenizer.json").is_file() else gpt2_from_files(path)
    return Tokenizer.load(path)


@functools.cache
def gpt2_file() -> Path | None:
    """OpenAI's tokenizer as a tokenizer.json, from the hub or its local cache."""
    return hub.fetch("openai-community/gpt2", "tokenizer.json")


def _gpt2(texts: Callable[[], Iterable[str]], say: Callable[[str], None]) -> Tokenizer:
    """OpenAI's tokenizer from the hub or its local cache; where neither answers, one of the same size."""
    file = gpt2_file()
    if file is None:
        source = texts()
        say(
            "tokenizer gpt2: no hub answers, so a byte-level BPE of the same size is trained on the source; for "
            "OpenAI's own put encoder.json and vocab.bpe into a folder and name that as tokenizer"
        )
        return train_bpe(source, GPT2_VOCAB)
    return Tokenizer.load(file)


def _gpt1() -> Tokenizer:
    """OpenAI's files from the hub or its local cache."""
    vocab, merges = (hub.fetch("openai-community/openai-gpt", name) for name in ("vocab.json", "merges.txt"))
    if vocab is None or merges is None:
        raise UserError(
            "tokenizer gpt1: no hub answers; put encoder_bpe_40000.json and vocab_40000.bpe into a folder and name "
            f"that, or take bpe:{GPT1_VOCAB}, made from the source"
        )
    return gpt1_from_files(vocab.parent)


def _noted(tokenizer: Tokenizer, say: Callable[[str], None]) -> Tokenizer:
    """The same tokenizer; says if it splits text other than the one it stands for."""
    if tokenizer.normalizer == gpt1.WITHOUT_SPACY:
        say(
            "this GPT-1 tokenizer was made without spaCy, so some words split other than in the original; "
            "pip install 'gptcli[gpt1]' and make it anew from OpenAI's files"
        )
    return tokenizer

"""From a recipe's `tokenizer:` value to a tokenizer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path

from gptcli import hub
from gptcli.errors import UserError, nearest
from gptcli.tokenizer.build import byte_tokenizer, char_tokenizer, gpt2_from_files, train_bpe
from gptcli.tokenizer.tokenizer import Tokenizer

GPT2_VOCAB = 50257
NAMES = ("gpt2", "bytes", "char", "bpe:SIZE")


def needs_text(spec: str) -> bool:
    """Whether this tokenizer is made from the source's own text."""
    return spec == "char" or spec.startswith("bpe:")


def known_vocab_size(spec: str | None) -> int | None:
    """The vocabulary a spec stands for, as far as its name says."""
    if spec == "gpt2":
        return GPT2_VOCAB
    if spec == "bytes":
        return 257
    if spec and spec.startswith("bpe:") and spec[4:].isdigit():
        return int(spec[4:])
    return None


def resolve_tokenizer(
    spec: str, texts: Callable[[], Iterable[str]], *, say: Callable[[str], None], progress: bool = False
) -> Tokenizer:
    """The tokenizer that `spec` names: gpt2 | bytes | char | bpe:SIZE | a path; `texts` gives the training text."""
    if spec == "bytes":
        return byte_tokenizer()
    if spec == "char":
        return char_tokenizer(texts())
    if spec.startswith("bpe:"):
        size = spec.removeprefix("bpe:")
        if not size.isdigit():
            raise UserError(f"tokenizer {spec}: write bpe:SIZE, such as bpe:8192")
        return train_bpe(texts(), int(size), progress=progress)
    path = Path(spec).expanduser()
    if path.exists():
        return from_path(path)
    if spec == "gpt2":
        return _gpt2(texts, say)
    hint = nearest(spec, NAMES) or f"; expected {' | '.join(NAMES)} | a path"
    raise UserError(f"tokenizer {spec}: no such file or name{hint}")


def from_path(path: Path) -> Tokenizer:
    """A tokenizer.json, or a folder with one, or with GPT-2's pair of files."""
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
        say(
            "tokenizer gpt2: no hub answers, so a byte-level BPE of the same size is trained on the source; for "
            "OpenAI's own put encoder.json and vocab.bpe into a folder and say -s tokenizer=FOLDER"
        )
        return train_bpe(texts(), GPT2_VOCAB)
    return Tokenizer.load(file)

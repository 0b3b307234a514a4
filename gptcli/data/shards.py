"""Token files on disk: train.bin and val.bin (uint16 or uint32), tokenizer.json, meta.json."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from gptcli.data.sources import SourceReader
from gptcli.errors import UserError
from gptcli.files import read_object
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.resolve import fingerprint, resolve_tokenizer

FORMAT_VERSION = 1
BATCH_BYTES = 2 << 20
SPLITS = ("train", "val")


@dataclass(frozen=True)
class TokenData:
    """An opened directory of tokens."""

    path: Path
    meta: dict[str, Any]
    tokenizer: Tokenizer

    def tokens(self, split: str) -> np.ndarray:
        """The split's ids, memory-mapped; empty if there are none."""
        dtype = np.dtype(self.meta["dtype"])
        expected = self.meta["splits"][split]["tokens"] + self.meta["splits"][split]["eot_tokens"]
        file = self.path / f"{split}.bin"
        size = file.stat().st_size if file.exists() else -1
        if size != expected * dtype.itemsize:
            raise UserError(f"{file}: {size} bytes, but meta.json says {expected} {dtype} tokens; tokenize again")
        return np.memmap(file, dtype, mode="r") if expected else np.empty(0, dtype)

    @property
    def hash(self) -> str:
        return str(self.meta["hash"])


@dataclass
class _Counts:
    documents: int = 0
    tokens: int = 0
    eot_tokens: int = 0
    bytes: int = 0


def open_tokens(path: str | Path) -> TokenData:
    """Raises UserError for a directory that `gpt tokenize -o` did not make."""
    path = Path(path)
    try:
        meta = read_object(path / "meta.json")
    except OSError as error:
        raise UserError(f"{path}: not a tokenized directory (no meta.json); make one with `gpt tokenize -o`") from error
    except ValueError as error:
        raise UserError(f"{path}/meta.json: not JSON ({error})") from error
    if meta.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}/meta.json: format_version {meta.get('format_version')}, this version reads 1")
    if missing := {"dtype", "splits", "tokenizer_hash", "hash"} - meta.keys():
        raise UserError(f"{path}/meta.json: damaged (no {min(missing)!r}); tokenize again")
    tokenizer = Tokenizer.load(path)
    if tokenizer.hash != meta["tokenizer_hash"]:
        raise UserError(f"{path}: tokenizer.json is not the one that made these tokens; tokenize again")
    return TokenData(path, meta, tokenizer)


@dataclass
class Splitter:
    """Which split each document belongs to.

    hash: by a hash of its text, so that adding documents moves none. tail: the last documents. A single document
    is cut at its tail, and is the only case in which a document is cut.
    """

    val_fraction: float
    split: str = "hash"
    cut_one: bool = False  # whether it was a single document, which now stands in both

    def __call__(self, documents: Iterable[str]) -> Iterator[tuple[str, str]]:
        """(split, text) pairs."""
        stream = iter(documents)
        head = list(itertools.islice(stream, 2))
        if len(head) == 1:
            cut = int(len(head[0]) * (1 - self.val_fraction))
            self.cut_one = 0 < cut < len(head[0])
            yield from ((s, t) for s, t in (("train", head[0][:cut]), ("val", head[0][cut:])) if t)
            return
        stream = itertools.chain(head, stream)
        if self.split == "hash":
            for text in stream:
                yield ("val" if hash_unit(text) < self.val_fraction else "train"), text
            return
        everything = list(stream)
        cut = int(len(everything) * (1 - self.val_fraction))
        yield from (("train" if i < cut else "val", text) for i, text in enumerate(everything))


def hash_unit(text: str) -> float:
    """A document's place in [0, 1), decided by its text alone."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2.0**64


def write_tokens(
    parts: Callable[[], Iterable[tuple[str, str]]],
    out: str | Path,
    tokenizer_spec: str,
    *,
    origin: dict[str, Any],
    say: Callable[[str], None] = lambda _: None,
    advance: Callable[[int], None] = lambda _: None,
) -> TokenData:
    """Tokenize (split, text) pairs into directory `out`; nothing appears there until all is written.

    `parts()` is called once to train the tokenizer and once to encode. `advance` gets the bytes done. Raises UserError
    for an empty corpus.
    """

    def texts() -> Iterator[str]:
        found = False
        for text in training_texts(parts(), tokenizer_spec):
            found = True
            yield text
        if not found:
            raise _empty(origin)

    tokenizer = resolve_tokenizer(tokenizer_spec, texts, say=say)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        started = time.perf_counter()
        counts = _encode_all(parts(), tokenizer, work, advance)
        seconds = time.perf_counter() - started
        if counts["train"].tokens == 0:
            raise _empty(origin)
        tokenizer.save(work)
        meta = {
            "format_version": FORMAT_VERSION,
            "dtype": _dtype(tokenizer).name,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": tokenizer_spec,
            "tokenizer_hash": tokenizer.hash,
            "splits": {name: vars(c) for name, c in counts.items()},
            "tokens_per_second": round(sum(c.tokens for c in counts.values()) / max(seconds, 1e-9)),
            "hash": _hash_files(work),
            **origin,
        }
        (work / "meta.json").write_text(json.dumps(meta, indent=2, ensure_ascii=False), "utf-8")
        if out.exists():
            shutil.rmtree(out)
        work.chmod(0o755)
        os.replace(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return open_tokens(out)


def training_texts(parts: Iterable[tuple[str, str]], tokenizer_spec: str) -> Iterator[str]:
    """Of (split, text) pairs, what a tokenizer is made of: the train split, but for `char`, which must know every
    character."""
    return (text for split, text in parts if split == "train" or tokenizer_spec == "char")


def _empty(origin: dict[str, Any]) -> UserError:
    names = ", ".join(map(str, origin.get("source", [])))
    return UserError(f"{names}: the corpus is empty, or all of it is held out; there is nothing to train on")


def _encode_all(
    parts: Iterable[tuple[str, str]], tokenizer: Tokenizer, folder: Path, advance: Callable[[int], None]
) -> dict[str, _Counts]:
    counts = {name: _Counts() for name in SPLITS}
    stream = iter(parts)
    head = list(itertools.islice(stream, 3))
    # Where no split has two documents there is nothing to separate.
    separated = len({split for split, _ in head}) < len(head)
    eot = [] if not separated else _end_of_text(tokenizer)
    files = {name: (folder / f"{name}.bin").open("wb") for name in SPLITS}
    try:
        for batch in _batched(itertools.chain(head, stream)):
            _encode_batch(batch, tokenizer, eot, files, counts)
            advance(sum(len(text) for _, text in batch))
    finally:
        for file in files.values():
            file.close()
    return counts


def _encode_batch(
    batch: list[tuple[str, str]],
    tokenizer: Tokenizer,
    eot: list[int],
    files: Mapping[str, IO[bytes]],
    counts: dict[str, _Counts],
) -> None:
    dtype = _dtype(tokenizer)
    encoded = tokenizer.encode_batch([text for _, text in batch])
    for (split, text), ids in zip(batch, encoded, strict=True):
        files[split].write(np.array(ids + eot, dtype).tobytes())
        c = counts[split]
        c.documents += 1
        c.tokens += len(ids)
        c.eot_tokens += len(eot)
        c.bytes += len(text.encode())


def _batched(parts: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch, size = [], 0
    for part in parts:
        batch.append(part)
        size += len(part[1])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _end_of_text(tokenizer: Tokenizer) -> list[int]:
    if tokenizer.eos_id is not None:
        return [tokenizer.eos_id]
    if tokenizer.normalizer is not None:  # GPT-1's vocabulary has no such token: its books follow one another
        return []
    raise UserError(
        "this tokenizer names no end-of-text token to put between documents; "
        'name one in tokenizer_config.json beside it: {"eos_token": "..."}'
    )


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def _hash_files(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in SPLITS:
        with (folder / f"{name}.bin").open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        digest.update(name.encode())
    return digest.hexdigest()[:16]


@dataclass
class Corpus:
    """Text that is still to be tokenized: one set of sources to be split, or train and val given apart."""

    source: list[str] = field(default_factory=list)
    train: list[str] = field(default_factory=list)
    val: list[str] = field(default_factory=list)
    val_fraction: float = 0.05
    split: str = "hash"
    text_key: str = "text"
    skip_bad: bool = False

    def __post_init__(self) -> None:
        self.cut_one = False  # whether a single document stands in both splits, known once `parts` has been read
        self._readers = {
            name: SourceReader(specs, self.text_key, self.skip_bad)
            for name, specs in (("source", self.source), ("train", self.train), ("val", self.val))
            if specs
        }

    def parts(self) -> Iterator[tuple[str, str]]:
        if "source" in self._readers:
            yield from self._split(self._readers["source"])
        elif "val" in self._readers:
            for name in SPLITS:
                yield from ((name, text) for text in self._readers[name].documents())
        else:
            yield from self._split(self._readers["train"])

    def _split(self, reader: SourceReader) -> Iterator[tuple[str, str]]:
        splitter = Splitter(self.val_fraction, self.split)
        yield from splitter(reader.documents())
        self.cut_one = splitter.cut_one

    @property
    def skipped(self) -> list[str]:
        return [reason for reader in self._readers.values() for reason in reader.skipped.reasons]

    def origin(self) -> dict[str, Any]:
        """What meta.json says of where the tokens came from."""
        return {
            "source": self.source or self.train + self.val,
            "val_fraction": self.val_fraction,
            "split": self.split,
        }

    def key(self, tokenizer_spec: str) -> str:
        """Changes whenever the tokens would."""
        files = {name: reader.fingerprint() for name, reader in self._readers.items()}
        plain = json.dumps([FORMAT_VERSION, files, fingerprint(tokenizer_spec), self.val_fraction, self.split])
        return hashlib.sha256(plain.encode()).hexdigest()[:24]

"""From a recipe's `data:` and `tokenizer:` to opened tokens; a source is tokenized once and cached."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gptcli.config.schema import DataBlock
from gptcli.data.cache import cache_dir
from gptcli.data.rows import MixtureRows, TokenRows
from gptcli.data.shards import Corpus, TokenData, open_tokens, training_texts, write_tokens
from gptcli.errors import UserError
from gptcli.files import publish_folder
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.resolve import needs_text, resolve_tokenizer


@dataclass(frozen=True)
class TrainingData:
    """One or several tokenized directories with the weights of their rows."""

    parts: list[TokenData]
    weights: list[float]

    @property
    def tokenizer(self) -> Tokenizer:
        return self.parts[0].tokenizer

    @property
    def hash(self) -> str:
        return "+".join(part.hash for part in self.parts)

    def rows(self, seq_len: int, seed: int) -> TokenRows | MixtureRows:
        streams = [TokenRows(p.tokens("train"), seq_len, seed, stream=i) for i, p in enumerate(self.parts)]
        return streams[0] if len(streams) == 1 else MixtureRows(streams, self.weights)

    def held_out(self) -> np.ndarray:
        """The held-out tokens of all parts, one after the other."""
        parts = [p.tokens("val") for p in self.parts]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def corpus_of(data: DataBlock) -> Corpus:
    return Corpus(
        source=data.source,
        train=data.train,
        val=data.val,
        val_fraction=data.val_fraction,
        split=data.split,
        text_key=data.text_key,
        skip_bad=data.skip_bad,
    )


def prepare(
    data: DataBlock,
    tokenizer_spec: str | None,
    *,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
    advance: Callable[[int], None] = lambda _: None,
) -> TrainingData:
    """Open, or make and cache, the tokens a recipe trains on. Raises UserError for anything unfit.

    `cache`: where to put new tokens instead of the user's cache."""
    if data.path is not None:
        return TrainingData([open_tokens(data.path)], [1.0])
    if data.mixture:
        blocks = [replace(data, mixture=[], path=part.path, source=part.source) for part in data.mixture]
        if tokenizer_spec is not None and needs_text(tokenizer_spec):
            sources = [corpus_of(block) for block in blocks if block.source]
            tokenizer_spec = str(_common_tokenizer(sources, tokenizer_spec, cache, say))
        parts = [p for b in blocks for p in prepare(b, tokenizer_spec, cache=cache, say=say, advance=advance).parts]
        if len({p.tokenizer.hash for p in parts}) > 1:
            raise UserError("data.mixture: its parts were made with different tokenizers")
        return TrainingData(parts, [part.weight for part in data.mixture])
    if not (data.source or data.train):
        raise UserError("data: nothing to train on; set data.source, data.path, data.train or data.mixture")
    assert tokenizer_spec is not None
    corpus = corpus_of(data)
    key = corpus.key(tokenizer_spec)
    folder = cache_dir() / "tokens" / key
    if cache is not None and not folder.is_dir():
        folder = cache / key
    if (folder / "meta.json").is_file():
        return TrainingData([open_tokens(folder)], [1.0])
    say(f"tokenizing {', '.join(corpus.origin()['source'])} with {tokenizer_spec} (once, then cached)")
    made = write_tokens(corpus.parts, folder, tokenizer_spec, origin=corpus.origin(), say=say, advance=advance)
    for reason in corpus.skipped[:5]:
        say(f"skipped {reason}")
    if len(corpus.skipped) > 5:
        say(f"skipped {len(corpus.skipped) - 5} more")
    return TrainingData([made], [1.0])


def _common_tokenizer(corpora: list[Corpus], spec: str, cache: Path | None, say: Callable[[str], None]) -> Path:
    """The directory of a tokenizer made of the text of all of them."""
    key = hashlib.sha256("".join(corpus.key(spec) for corpus in corpora).encode()).hexdigest()[:24]
    folder = cache_dir() / "tokenizers" / key
    if cache is not None and not folder.is_dir():
        folder = cache / key
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        texts = lambda: itertools.chain.from_iterable(training_texts(c.parts(), spec) for c in corpora)  # noqa: E731
        publish_folder(folder, resolve_tokenizer(spec, texts, say=say).save)
    return folder


def checkpoint_tokenizer_matches(data: TrainingData, tokenizer: Tokenizer, where: str) -> None:
    """Raises UserError if the tokens were made by another tokenizer than the checkpoint's."""
    if data.tokenizer.hash != tokenizer.hash:
        raise UserError(
            f"{where}: its tokenizer ({tokenizer.hash}) is not the one that made the data ({data.tokenizer.hash}); "
            "tokenize with the checkpoint's: `gpt tokenize SOURCE -o DIR --tokenizer CHECKPOINT`"
        )

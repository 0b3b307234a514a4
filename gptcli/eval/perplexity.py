"""Perplexity and bits per byte over windows that slide by a stride."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptcli.contracts import IGNORE_INDEX
from gptcli.dist.runtime import autocast
from gptcli.errors import UserError
from gptcli.model import GPT
from gptcli.tokenizer import Tokenizer

BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Window:
    """Predict ids[begin + 1 : end + 1] from ids[begin : end]; only the targets from `first` on count."""

    begin: int
    first: int
    end: int


def windows(n_ids: int, context_length: int, stride: int) -> Iterator[Window]:
    """Every id but the first is a target exactly once. The first window counts all of its targets; each further
    one moves on by `stride` and counts the new ones alone, so with stride = context_length windows are disjoint, but
    that the last one looks back for a full context."""
    end = 0
    while end < n_ids - 1:
        first = end
        end = min(n_ids - 1, context_length if end == 0 else end + stride)
        yield Window(max(0, end - context_length), first, end)


@torch.inference_mode()
def stream_logprobs(
    model: GPT,
    streams: Sequence[Sequence[int]],
    *,
    stride: int | None = None,
    dtype: torch.dtype = torch.float32,
    advance: Callable[[float], None] = lambda _: None,
) -> list[Tensor]:
    """Of each stream the log-probability of every id but its first, (len - 1,) on the host. stride: by default half
    the context. Raises UserError for one that is longer than the context."""
    context_length = model.config.context_length
    stride = stride or max(1, context_length // 2)
    if stride > context_length:
        raise UserError(f"--stride {stride}: is more than the model's context of {context_length} tokens")
    ids = [torch.tensor(stream) for stream in streams]
    out = [torch.zeros(max(0, len(stream) - 1)) for stream in streams]
    todo = [(i, w) for i, stream in enumerate(streams) for w in windows(len(stream), context_length, stride)]
    todo.sort(key=lambda place: place[1].begin - place[1].end)  # longest first; windows of one stream keep their order
    rows = max(1, BATCH_TOKENS // context_length)
    device = model.wte.weight.device
    for start in range(0, len(todo), rows):
        batch = todo[start : start + rows]
        tokens, targets = _rows(ids, batch)
        with autocast(device, dtype):
            logprobs = model(tokens.to(device), targets=targets.to(device), greedy=True).logprobs
        assert logprobs is not None
        for (i, w), row in zip(batch, logprobs.cpu(), strict=True):
            out[i][w.first : w.end] = row[w.first - w.begin : w.end - w.begin]
        advance((start + len(batch)) / len(todo))
    return out


def _rows(ids: list[Tensor], batch: list[tuple[int, Window]]) -> tuple[Tensor, Tensor]:
    """Right-padded tokens and targets; causality keeps the padding from mattering."""
    longest = max(w.end - w.begin for _, w in batch)
    tokens = torch.zeros(len(batch), longest, dtype=torch.long)
    targets = torch.full((len(batch), longest), IGNORE_INDEX)
    for row, (i, w) in enumerate(batch):
        tokens[row, : w.end - w.begin] = ids[i][w.begin : w.end]
        targets[row, w.first - w.begin : w.end - w.begin] = ids[i][w.first + 1 : w.end + 1]
    return tokens, targets


@dataclass(frozen=True)
class Perplexity:
    """`nll` in nats over `tokens` targets, which stand for `bytes` of UTF-8 and `words` between white space."""

    nll: float
    tokens: int
    bytes: int
    words: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll / self.tokens, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return self.nll / math.log(2) / self.bytes


@dataclass(frozen=True)
class Stream:
    """Ids of documents as a training sees them, and each document's share: ids[begin : end] are its targets."""

    ids: list[int]
    parts: list[tuple[int, int]]


def join_documents(texts: Sequence[str], tokenizer: Tokenizer) -> Stream:
    """The token that begins a text (end-of-text, or bos), then the documents, of several each with its end-of-text."""
    eot = [] if tokenizer.eos_id is None or len(texts) < 2 else [tokenizer.eos_id]
    ids = [] if tokenizer.start_id is None else [tokenizer.start_id]
    parts = []
    for encoded in tokenizer.encode_batch(texts):
        begin = max(1, len(ids))  # where nothing begins the stream, its first token is not a target
        ids += encoded + eot
        parts.append((begin, len(ids)))
    return Stream(ids, parts)


def measure_documents(model: GPT, tokenizer: Tokenizer, texts: Sequence[str], **options: Any) -> list[Perplexity]:
    """The perplexity of each text, scored one after the other as one stream. `options`: stride (by default half the
    context), dtype and advance of `stream_logprobs`.

    Where the tokenizer has a token that begins a text, it begins the stream, so every token of the text is scored; the
    end-of-text tokens between documents are scored too. Raises UserError if there is nothing to score.
    """
    stream = join_documents(texts, tokenizer)
    if len(stream.ids) < 2:
        raise UserError("the text is empty; there is nothing to score")
    nll = -stream_logprobs(model, [stream.ids], **options)[0].double()
    return [
        Perplexity(nll[begin - 1 : end - 1].sum().item(), end - begin, len(text.encode()), len(text.split()))
        for text, (begin, end) in zip(texts, stream.parts, strict=True)
    ]

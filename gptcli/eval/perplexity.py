"""Perplexity and bits per byte over windows that slide by a stride."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from gptcli.contracts import IGNORE_INDEX
from gptcli.errors import UserError
from gptcli.model import GPT
from gptcli.tokenizer import Tokenizer
from gptcli.train.loop import autocast

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


@dataclass(frozen=True)
class Perplexity:
    """`nll` in nats over `tokens` targets, which stand for `bytes` of UTF-8."""

    nll: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll / self.tokens, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return self.nll / math.log(2) / self.bytes


def join_documents(texts: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """Ids of the documents as a training sees them: end-of-text before the first and after each of several."""
    eot = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    ids = list(eot)
    for encoded in tokenizer.encode_batch(texts):
        ids += encoded + (eot if len(texts) > 1 else [])
    return ids


@torch.inference_mode()
def measure(
    model: GPT,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    stride: int | None = None,
    dtype: torch.dtype = torch.float32,
    advance: Callable[[float], None] = lambda _: None,
) -> Perplexity:
    """The texts' perplexity, one after the other as one stream. stride: by default half the context.

    Where the tokenizer has an end-of-text token it begins the stream, so every token of the text is scored; the
    end-of-text tokens between documents are scored too. Raises UserError if there is nothing to score.
    """
    context_length = model.config.context_length
    stride = stride or max(1, context_length // 2)
    if stride > context_length:
        raise UserError(f"--stride {stride}: is more than the model's context of {context_length} tokens")
    ids = torch.tensor(join_documents(texts, tokenizer))
    if len(ids) < 2:
        raise UserError("the text is empty; there is nothing to score")
    nll, counted = 0.0, 0
    for batch in _batches(list(windows(len(ids), context_length, stride)), context_length):
        tokens, targets = _rows(ids, batch)
        with autocast(model.wte.weight.device, dtype):
            output = model(tokens.to(model.wte.weight.device), targets=targets.to(model.wte.weight.device))
        assert output.logprobs is not None
        nll -= output.logprobs.double().sum().item()
        counted += int((targets != IGNORE_INDEX).sum())
        advance(batch[-1].end / (len(ids) - 1))
    return Perplexity(nll, counted, sum(len(text.encode()) for text in texts))


def _batches(all_windows: list[Window], context_length: int) -> Iterator[list[Window]]:
    rows = max(1, BATCH_TOKENS // context_length)
    for i in range(0, len(all_windows), rows):
        yield all_windows[i : i + rows]


def _rows(ids: torch.Tensor, batch: list[Window]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded tokens and targets; causality keeps the padding from mattering."""
    longest = max(w.end - w.begin for w in batch)
    tokens = torch.zeros(len(batch), longest, dtype=torch.long)
    targets = torch.full((len(batch), longest), IGNORE_INDEX)
    for row, w in enumerate(batch):
        tokens[row, : w.end - w.begin] = ids[w.begin : w.end]
        targets[row, w.first - w.begin : w.end - w.begin] = ids[w.first + 1 : w.end + 1]
    return tokens, targets

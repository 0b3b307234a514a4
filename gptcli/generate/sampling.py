"""Pure functions on logits (B, V). Order: repetition penalty, temperature, top-k, top-p, min-p, draw.

Semantics are Hugging Face's where OpenAI's differ: top-p keeps the token that crosses the mass (OpenAI's released
code drops it), and top-k keeps ties.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptcli.config.schema import SamplingParams
from gptcli.randomness import uniform


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """CTRL (Keskar et al. 2019, section 4.1): the logit of a token seen is divided by `penalty` if positive, else
    multiplied, once however often it was seen. seen (B, V) is True where the token stands in prompt or text."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf for all below the k-th largest; ties with it stay."""
    if k >= logits.shape[-1]:
        return logits
    threshold = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < threshold, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Nucleus (Holtzman et al. 2020, section 3.1): the smallest set of likeliest tokens whose mass reaches p."""
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    probs = ordered.softmax(-1)
    drop = probs.cumsum(-1) - probs >= p  # the mass before this token is already enough
    drop[..., 0] = False
    return logits.masked_fill(drop.scatter(-1, index, drop), -torch.inf)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """-inf for tokens less likely than min_p times the likeliest."""
    probs = logits.softmax(-1)
    return logits.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), -torch.inf)


def process(logits: Tensor, params: SamplingParams, seen: Tensor | None) -> Tensor:
    """Logits (B, V) after every processor of `params`, in order; fp32. Temperature 0 leaves them undivided."""
    logits = logits.float()
    if params.repetition_penalty != 1.0 and seen is not None:
        logits = penalize_repetition(logits, seen, params.repetition_penalty)
    if params.temperature not in (0.0, 1.0):
        logits = logits / params.temperature
    if params.temperature == 0.0:
        return logits
    if params.top_k is not None:
        logits = keep_top_k(logits, params.top_k)
    if params.top_p is not None and params.top_p < 1.0:
        logits = keep_top_p(logits, params.top_p)
    if params.min_p:
        logits = keep_min_p(logits, params.min_p)
    return logits


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """One token per row (B,) by inverting the cumulative distribution at `uniforms` (B,), each in [0, 1)."""
    cumulative = logits.softmax(-1, dtype=torch.float32).cumsum(-1)
    total = cumulative[:, -1:]
    # a number that rounds to 1 must not fall behind the last token that has any probability
    at = torch.minimum(uniforms.to(cumulative)[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, at, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def choose(logits: Tensor, params: SamplingParams, streams: Sequence[int], positions: Sequence[int]) -> Tensor:
    """The next token of each row (B,) from processed logits. Each row's draw depends on (seed, its stream, its
    position) alone, so neither neighbours nor batch size change it."""
    if params.temperature == 0.0:
        return logits.argmax(-1)
    numbers = [uniform(params.seed, "sample", s, p) for s, p in zip(streams, positions, strict=True)]
    return draw(logits, torch.tensor(numbers, device=logits.device))

"""Which tokens may be drawn, and the draw. Pure functions on logits (B, V); their order is in processors.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gptcli.randomness import uniforms

SHORT_LIST = 1024  # tokens to look for a nucleus in, before longer lists are
BLOCK = 64  # tokens of a row that are looked at together
ROUNDING = 1e-5  # of sums of probabilities


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf for all below the k-th largest; ties with it stay."""
    if k >= logits.shape[-1]:
        return logits
    threshold = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < threshold, -torch.inf)


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """What keep_top_k keeps: logits (B, k) and their ids (B, k) in rising order of ids. None where a row ties at the
    end, so that more than k stay."""
    best, ids = best_of_long(logits, k + 1)
    if any(last == beyond > -math.inf for last, beyond in best[:, k - 1 :].tolist()):
        return None
    ids, order = ids[:, :k].sort(dim=-1)
    return best.gather(-1, order), ids


def best_of_long(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """x.topk(n) of (B, V). Of a long row a CPU sorts only those blocks whose maxima are the n largest, and the rest of
    it behind the last block: the n best lie nowhere else. Half of the time for 50 of 50,257."""
    V = x.shape[-1]
    if x.device.type != "cpu" or 4 * BLOCK * n > V:
        return x.topk(n)
    whole = V - V % BLOCK
    blocks = x[:, :whole].view(len(x), -1, BLOCK).amax(-1).topk(n, sorted=False).indices
    within = (blocks[:, :, None] * BLOCK + torch.arange(BLOCK, device=x.device)).flatten(1)
    places = torch.cat([within, torch.arange(whole, V, device=x.device).expand(len(x), -1)], dim=1)
    best, at = x.gather(1, places).topk(n)
    return best, places.gather(1, at)


def keep_top_p(logits: Tensor, p: float, mode: str = "hf") -> Tensor:
    """Nucleus (Holtzman et al. 2020, section 3.1): the smallest set of likeliest tokens whose mass reaches p.

    mode "openai" is GPT-2's released sampler: the largest set whose mass is at most p, but never empty. It lacks
    the token that crosses p, and keeps what ties with its last one.
    """
    probs = logits.softmax(-1)
    ordered, index = largest_first(probs, lambda best: best.sum(-1) > p + ROUNDING)
    mass = ordered.cumsum(-1)
    if mode == "openai":
        last = ((mass <= p).sum(-1, keepdim=True) - 1).clamp(min=0)
        return logits.masked_fill(probs < ordered.gather(-1, last), -torch.inf)
    keep = mass - ordered < p  # the mass before a dropped token is already enough
    keep[..., 0] = True
    return logits.masked_fill(~torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, keep), -torch.inf)


def largest_first(x: Tensor, enough: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Values and indices of x (B, V) in falling order, equal ones by index; only so many of them that the values above
    the last are `enough` (B, n) -> (B,) for each row. A vocabulary is sorted in 3 ms a row, its best 1024 in 0.3."""
    n, V = SHORT_LIST, x.shape[-1]
    while n < V:
        best, index = x.topk(n)
        if enough(best.masked_fill(best == best[..., -1:], 0.0)).all():
            index, by_index = index.sort(dim=-1)
            best, by_value = best.gather(-1, by_index).sort(dim=-1, descending=True, stable=True)
            return best, index.gather(-1, by_value)
        n *= 8
    return x.sort(dim=-1, descending=True, stable=True)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """-inf for tokens less likely than min_p times the likeliest."""
    probs = logits.softmax(-1)
    return logits.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), -torch.inf)


def keep_typical(logits: Tensor, mass: float) -> Tensor:
    """Locally typical sampling (Meister et al. 2023, section 4): tokens by how far their surprise lies from the
    expected one, the entropy, until `mass` is reached; ties with the last stay."""
    logprobs = logits.log_softmax(-1)
    probs = logprobs.exp()
    distance = (-logprobs - torch.special.entr(probs).sum(-1, keepdim=True)).abs()
    ordered, index = distance.sort(dim=-1)
    last = (probs.gather(-1, index).cumsum(-1) < mass).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return logits.masked_fill(distance > ordered.gather(-1, last), -torch.inf)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """One token per row (B,) by inverting the cumulative distribution at `uniforms` (B,), each in [0, 1)."""
    cumulative = logits.softmax(-1, dtype=torch.float32).cumsum(-1)
    total = cumulative[:, -1:]
    # a number that rounds to 1 must not fall behind the last token that has any probability
    at = torch.minimum(uniforms.to(cumulative)[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, at, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def choose(
    logits: Tensor, temperature: float, seeds: Sequence[int], streams: Sequence[int], positions: Sequence[int]
) -> Tensor:
    """The next token of each row (B,) from processed logits. Each row's draw depends on its (seed, stream, position)
    alone, so neither neighbours nor batch size change it."""
    if temperature == 0.0:
        return logits.argmax(-1)
    numbers = uniforms("sample", zip(seeds, streams, positions, strict=True))
    return draw(logits, torch.from_numpy(numbers).float().to(logits.device))


def largest(scores: Tensor, top: int) -> list[list[tuple[int, float]]]:
    """(place, score) of the `top` largest in each row of (B, V), largest first; of all where there are fewer."""
    if top == 0:  # the usual case, at every token
        return [[] for _ in scores]
    best = scores.topk(min(top, scores.shape[-1]), dim=-1)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [list(zip(places, values, strict=True)) for places, values in rows]

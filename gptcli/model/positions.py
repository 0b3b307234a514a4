"""How positions enter: their numbers, and the sinusoidal, rotary and ALiBi schemes (learned ones are a table)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gptcli.config.schema import ModelConfig, RopeScaling
from gptcli.model.kv_cache import CacheStep


def default_positions(
    tokens: Tensor, attention_mask: Tensor | None, document_ids: Tensor | None, step: CacheStep | None
) -> Tensor:
    """(B or 1, T): cached tokens continue their row; padding does not count; each document starts at 0."""
    if step is not None:
        return step.slots
    if attention_mask is not None:
        return (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    index = torch.arange(tokens.shape[1], device=tokens.device)[None]
    if document_ids is None:
        return index
    first = torch.ones_like(document_ids, dtype=torch.bool)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(first, index, 0).cummax(1).values


def sinusoids(config: ModelConfig, position_ids: Tensor) -> Tensor:
    """(B or 1, T, C): sines in even places, cosines in odd ("Attention Is All You Need", section 3.5)."""
    even = torch.arange(0, config.n_embd, 2, device=position_ids.device, dtype=torch.float32)
    angles = position_ids[..., None].float() * 10000.0 ** (-even / config.n_embd)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def alibi_slopes(n_head: int, *, device: torch.device | None = None) -> Tensor:
    """(H,): a score falls by its head's slope per token of distance (Press et al. 2022, section 3).

    2^-(8/n), 2^-(16/n), ... for n a power of two; other counts take every other slope of the next power.
    """
    n = 2 ** math.floor(math.log2(n_head))
    i = torch.arange(n_head, device=device)  # by arithmetic there: a CUDA graph takes nothing from the host
    return torch.exp2(-torch.where(i < n, 8 * (i + 1) / n, 4 * (2 * (i - n) + 1) / n))


def rotary_angles(config: ModelConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B or 1, 1, T, D/2) of RoPE (Su et al. 2021, section 3.2)."""
    half = torch.arange(0, config.head_dim, 2, device=position_ids.device, dtype=torch.float32)
    frequencies = 1.0 / config.rope_theta ** (half / config.head_dim)
    if config.rope_scaling is not None:
        frequencies = stretched(frequencies, config.rope_scaling)
    angles = position_ids[:, None, :, None].float() * frequencies
    return angles.cos(), angles.sin()


def stretched(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Frequencies (D/2,) of a stretched context. linear: position interpolation (Chen et al. 2023, section 2.3).
    llama3: waves that fit the old context often keep their frequency, long ones are interpolated, between them
    a ramp (Llama 3.1's reference implementation)."""
    slow = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slow
    turns = scaling.original_context_length * frequencies / (2 * math.pi)  # in the old context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    ramp = ((turns - low) / (high - low)).clamp(0, 1) if high > low else (turns > low).float()
    return (1 - ramp) * slow + ramp * frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) of (B, H, T, D) by their position's angles."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)

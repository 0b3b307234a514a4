"""What a model thinks of given responses, without learning from them: the frozen reference, and the policy's past."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptcli.dist.runtime import autocast
from gptcli.model import GPT


@dataclass(frozen=True)
class Opinion:
    """Per position. Log-probabilities are 0 where there is no target; values are 0 where there is no value head."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor


@torch.no_grad()
def judge(model: GPT, tokens: Tensor, targets: Tensor, *, temperature: float, rows: int, dtype: torch.dtype) -> Opinion:
    """The model's opinion of `tokens` (B, T), `rows` at a time: as many as in training, so that there the first
    ratios are exactly 1."""
    parts = []
    for i in range(0, len(tokens), rows):
        with autocast(tokens.device, dtype):
            part = slice(i, i + rows)
            parts.append(model(tokens[part], targets=targets[part], temperature=temperature, entropy=True))
    logprobs, entropy = (torch.cat([getattr(out, name) for out in parts]) for name in ("logprobs", "entropy"))
    values = torch.zeros_like(logprobs)
    if "value" in model.scalar_heads:
        values = torch.cat([out.scalars["value"][..., 0].float() for out in parts])
    return Opinion(logprobs, entropy, values)

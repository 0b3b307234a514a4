"""Prompts and responses as padded rows.

Everything per token stands where the token is chosen: position t sees tokens up to t and holds the log-probability,
value, reward and advantage of token t + 1. `targets` says which positions belong to the response; masks come from
lengths, never from ids, so an end-of-text counts even where it is the padding too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from gptcli.contracts import IGNORE_INDEX
from gptcli.randomness import Permutation, derive

PAD = 0  # any id: padding stands behind the row, where causal attention never looks


def pad_rows(rows: Sequence[Sequence[int]], value: int = PAD, width: int | None = None) -> Tensor:
    """(B, width) ids, each row followed by padding; `width`: the longest row's."""
    width = max(map(len, rows)) if width is None else width
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def response_rows(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], width: int | None = None
) -> tuple[Tensor, Tensor]:
    """tokens and targets (B, T) of prompts continued by responses; targets are the response's tokens alone."""
    pairs = list(zip(prompts, responses, strict=True))
    tokens = pad_rows([[*prompt, *response][:-1] for prompt, response in pairs], PAD, width)
    ignored = [[*[IGNORE_INDEX] * (len(prompt) - 1), *response] for prompt, response in pairs]
    return tokens, pad_rows(ignored, IGNORE_INDEX, width)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x where mask is True. What stands elsewhere may be anything, NaN included."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def last_index(mask: Tensor) -> Tensor:
    """(B,): the last position where mask (B, T) is True, whichever side the padding is on."""
    return (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(1)


def pass_order(n: int, seed: int, purpose: str, numbers: Iterable[int]) -> list[int]:
    """Which of n items come as numbers `numbers` (from 0, over all passes); every pass has an order of its own."""
    by_pass: dict[int, Permutation] = {}
    order = []
    for number in numbers:
        turn, place = divmod(number, n)
        if turn not in by_pass:
            by_pass[turn] = Permutation(n, derive(seed, purpose, turn))
        order.append(int(by_pass[turn][np.array([place])][0]))
    return order

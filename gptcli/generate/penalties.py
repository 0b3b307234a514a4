"""What the ids so far do to the logits (B, V) of the next: penalties and bans. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PAD = -1  # no token's id, so that padding equals nothing


class History:
    """The ids so far of the rows still going: tokens (B, T), padded at the left, and how many of them are new (B,).

    All rows end in the last column: how a row ends is a slice, whatever the lengths of the others.
    """

    def __init__(
        self, rows: Sequence[Sequence[int]], prompt_lengths: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        width = max(map(len, rows))
        padded = [[PAD] * (width - len(row)) + list(row) for row in rows]
        self.tokens = torch.tensor(padded, device=device)
        self.new = torch.tensor([len(r) - n for r, n in zip(rows, prompt_lengths, strict=True)], device=device)

    def append(self, tokens: Tensor) -> None:
        """Each row's next id (B,)."""
        self.tokens = torch.cat([self.tokens, tokens[:, None]], dim=1)
        self.new = self.new + 1

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may be taken several times."""
        index = torch.tensor(rows, device=self.tokens.device)
        self.tokens, self.new = self.tokens[index], self.new[index]

    def counts(self, vocab_size: int, *, new_only: bool = False) -> Tensor:
        """(B, V): how often each token stands in the row, or in its new part alone."""
        counted = self.tokens != PAD
        if new_only:
            width = self.tokens.shape[1]
            counted &= torch.arange(width, device=counted.device) >= width - self.new[:, None]
        zeros = torch.zeros(counted.shape[0], vocab_size, dtype=torch.int, device=counted.device)
        return zeros.scatter_add_(1, self.tokens.clamp(min=0), counted.int())


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """CTRL (Keskar et al. 2019, section 4.1): the logit of a token seen is divided by `penalty` if positive, else
    multiplied, once however often it was seen. seen (B, V) is True where the token stands in prompt or text."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalize_generated(logits: Tensor, counts: Tensor, presence: float, frequency: float) -> Tensor:
    """OpenAI's API: `presence` off the logit of each token generated, and `frequency` for each time. counts (B, V)."""
    return logits - presence * (counts > 0) - frequency * counts


def ends_repeated_ngram(history: History, n: int, vocab_size: int) -> Tensor:
    """(B, V): tokens that would end a run of n which stands in the row already."""
    tokens = history.tokens
    banned = torch.zeros(tokens.shape[0], vocab_size, dtype=torch.int, device=tokens.device)
    if tokens.shape[1] < n:
        return banned.bool()
    runs = tokens.unfold(1, n, 1)  # (B, T - n + 1, n)
    begun = tokens[:, tokens.shape[1] - n + 1 :]  # what the next token would end
    again = (runs[..., :-1] == begun[:, None]).all(-1) & (runs[..., -1] != PAD)
    return banned.scatter_add_(1, runs[..., -1].clamp(min=0), again.int()).bool()


def ends_sequence(history: History, sequences: Tensor, vocab_size: int) -> Tensor:
    """(B, V): tokens that would end one of `sequences` (N, L), of which the row ends with all but the last."""
    tokens, begun, last = history.tokens, sequences[:, :-1], sequences[:, -1]
    banned = torch.zeros(tokens.shape[0], vocab_size, dtype=torch.int, device=tokens.device)
    start = tokens.shape[1] - begun.shape[1]
    if start < 0:
        return banned.bool()
    matches = (tokens[:, None, start:] == begun).all(-1)  # (B, N)
    return banned.index_add_(1, last, matches.int()).bool()


def ban(logits: Tensor, banned: Tensor) -> Tensor:
    """-inf where `banned` (B, V); a row that would have no token left ignores the ban."""
    possible = (logits > -torch.inf) & ~banned
    return logits.masked_fill(banned & possible.any(-1, keepdim=True), -torch.inf)

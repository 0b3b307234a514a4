"""Log-probabilities of given tokens from hidden states, chunk by chunk, without ever holding all logits.

At GPT-2's vocabulary the logits of a batch outweigh every other activation. Each chunk's logits are used and
dropped, and made again in the backward pass; where all of them together are small they are kept instead, which
saves that second product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptcli.config.memory import LOGITS_CHUNK_BYTES, LOGITS_KEEP_BYTES
from gptcli.model.linear import product

IGNORE_INDEX = -100


def token_logprobs(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden @ head.T / temperature)[target] for every position, in fp32.

    hidden (B, T, C), head (padded vocabulary, C), targets (B, T) with IGNORE_INDEX where none is wanted: those
    get 0. Returns log-probabilities (B, T) and, on request, the entropy of the distribution (B, T), in nats.
    """
    B, T, C = hidden.shape
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, head = hidden.to(dtype), head.to(dtype)
    logprobs, entropies = _ChunkedLogProbs.apply(
        hidden.reshape(B * T, C), head, targets.reshape(B * T), vocab_size, temperature, entropy
    )
    return logprobs.view(B, T), entropies.view(B, T) if entropy else None


@torch.no_grad()
def measure_targets(hidden: Tensor, head: Tensor, targets: Tensor, *, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The same log-probabilities (B, T) without a gradient, and whether each target is the likeliest token (B, T).

    Only positions with a target meet the head, which is most of a small model's work where few are wanted.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, head = hidden.to(dtype), head.to(dtype)
    logprobs = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
    greedy = torch.zeros(targets.shape, dtype=torch.bool, device=hidden.device)
    wanted = targets != IGNORE_INDEX
    rows = max(1, LOGITS_CHUNK_BYTES // (4 * head.shape[0]))
    picked, likeliest = [], []
    for states, ids in zip(hidden[wanted].split(rows), targets[wanted].split(rows), strict=True):
        logp = _log_softmax(states, head, vocab_size, 1.0)
        picked.append(logp.gather(1, ids[:, None])[:, 0])
        likeliest.append(logp.argmax(1) == ids)
    logprobs[wanted], greedy[wanted] = torch.cat(picked), torch.cat(likeliest)
    return logprobs, greedy


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        vocab_size: int,
        temperature: float,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        n = hidden.shape[0]
        row_bytes = 4 * head.shape[0]
        rows = max(1, min(n, LOGITS_CHUNK_BYTES // row_bytes))
        keep = n * row_bytes <= LOGITS_KEEP_BYTES and any(ctx.needs_input_grad[:2])
        logprobs = hidden.new_empty(n, dtype=torch.float32)
        entropies = hidden.new_empty(n if entropy else 0, dtype=torch.float32)
        kept = []
        for i in range(0, n, rows):
            part = slice(i, min(i + rows, n))
            logp = _log_softmax(hidden[part], head, vocab_size, temperature)
            index = targets[part].clamp(min=0)
            picked = logp.gather(1, index[:, None])[:, 0]
            logprobs[part] = picked.masked_fill(targets[part] == IGNORE_INDEX, 0.0)
            if entropy:
                entropies[part] = -(logp.exp() * logp).sum(1)
            if keep:
                kept.append(logp)
        ctx.save_for_backward(hidden, head, targets, entropies, *kept)
        ctx.rows, ctx.vocab_size, ctx.temperature, ctx.entropy = rows, vocab_size, temperature, entropy
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropies: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, targets, entropies, *kept = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros(head.shape, device=head.device, dtype=torch.float32)
        wanted = targets != IGNORE_INDEX
        grad_logprobs = grad_logprobs * wanted
        for number, i in enumerate(range(0, hidden.shape[0], ctx.rows)):
            part = slice(i, min(i + ctx.rows, hidden.shape[0]))
            if kept:
                logp = kept[number]
            else:
                logp = _log_softmax(hidden[part], head, ctx.vocab_size, ctx.temperature)
            g = grad_logprobs[part, None]
            # d logp[y] / d z = onehot(y) - p;   d H / d z = -p (logp + H)
            if ctx.entropy:
                p = logp.exp()
                dz = -p * (g + grad_entropies[part, None] * (logp + entropies[part, None]))
            else:
                dz = logp.exp().mul_(-g)  # kept chunks stay as they are: backward may run twice
            dz.scatter_add_(1, targets[part, None].clamp(min=0), g)
            if ctx.temperature != 1.0:
                dz /= ctx.temperature
            dz = dz.to(hidden.dtype)
            real_rows = head[: ctx.vocab_size]
            if grad_hidden is not None:
                grad_hidden[part] = product(dz, real_rows.T)
            if ctx.needs_input_grad[1]:
                grad_head[: ctx.vocab_size] += product(dz.T, hidden[part].T)
        return (
            grad_hidden,
            grad_head.to(head.dtype) if ctx.needs_input_grad[1] else None,
            None,
            None,
            None,
            None,
        )


def _log_softmax(hidden: Tensor, head: Tensor, vocab_size: int, temperature: float) -> Tensor:
    """(rows, vocab_size) in fp32; the padded columns never enter the sum."""
    logits = product(hidden, head)[:, :vocab_size]
    if temperature != 1.0:
        logits = logits / temperature
    return logits.log_softmax(-1, dtype=torch.float32)

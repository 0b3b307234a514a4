"""Log-probabilities of given tokens from hidden states, chunk by chunk, without ever holding all logits.

At GPT-2's vocabulary the logits of a batch outweigh every other activation. Each chunk's logits are used and
dropped, and made again in the backward pass; where all of them together are small they are kept instead, which
saves that second product. In fp32 what is kept is their softmax; in half precision, the logits as multiplied and
each row's log-sum-exp, of which a compiled backward pass makes the gradient in one sweep.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptcli.config.memory import logits_room, logits_rows
from gptcli.model.linear import product

IGNORE_INDEX = -100
NEVER = -1e30  # the logit of a padded column: finite, so that its share of an entropy is 0 and no NaN


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
    get 0. Returns log-probabilities (B, T) and, on request, the entropy of the distribution (B, T), in nats; 0 too
    where no target is.
    """
    B, T, C = hidden.shape
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, head = hidden.to(dtype), head.to(dtype)
    states, wanted = hidden.reshape(B * T, C), targets.reshape(B * T)
    places = _some(wanted)
    if places is not None:
        states, wanted = states[places], wanted[places]
    found = _ChunkedLogProbs.apply(states, head, wanted, vocab_size, temperature, entropy)
    if places is not None:
        found = [torch.zeros(B * T).index_copy(0, places, x) if len(x) else x for x in found]
    logprobs, entropies = found
    return logprobs.view(B, T), entropies.view(B, T) if entropy else None


def _some(targets: Tensor) -> Tensor | None:
    """The places of the targets (N,) that are wanted, to be looked at alone: the head is most of a small model's work,
    and prompts and padding want nothing of it. Not on a GPU, which would wait to know how many there are."""
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    places = (targets != IGNORE_INDEX).nonzero()[:, 0]
    return places if 0 < len(places) < len(targets) else None


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
    rows, _ = chunks(hidden[wanted], head)
    picked, likeliest = [], []
    for states, ids in zip(hidden[wanted].split(rows), targets[wanted].split(rows), strict=True):
        logp = _logits(states, head, vocab_size, 1.0).log_softmax(-1, dtype=torch.float32)
        picked.append(logp.gather(1, ids[:, None])[:, 0])
        likeliest.append(logp.argmax(1) == ids)
    logprobs[wanted], greedy[wanted] = torch.cat(picked), torch.cat(likeliest)
    return logprobs, greedy


def chunks(hidden: Tensor, head: Tensor) -> tuple[int, bool]:
    """Rows of `hidden` (N, C) whose logits are made at once, and whether those of all are kept."""
    room = logits_room(half=hidden.dtype != torch.float32)
    (tokens, C), vocab = hidden.shape, head.shape[0]
    return logits_rows(tokens, vocab, C, room), tokens * vocab * hidden.element_size() <= room.keep


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
        rows, keep = chunks(hidden, head)
        half = hidden.dtype != torch.float32
        picked, entropies, kept, sums = [], [], [], []
        for states, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = _logits(states, head, vocab_size, temperature)
            logp = logits.log_softmax(-1, dtype=torch.float32)
            index = wanted.clamp(min=0)[:, None]
            chosen = logp.gather(1, index)
            picked.append(chosen[:, 0].masked_fill(wanted == IGNORE_INDEX, 0.0))
            if entropy:
                entropies.append(-(logp.exp() * logp).sum(1).masked_fill(wanted == IGNORE_INDEX, 0.0))
            if keep and any(ctx.needs_input_grad[:2]):
                kept.append(logits if half else logp)
                if half:
                    sums.append(logits.gather(1, index) - chosen)  # log-sum-exp (rows, 1), in fp32
        H = torch.cat(entropies) if entropy else hidden.new_empty(0, dtype=torch.float32)
        ctx.save_for_backward(hidden, head, targets, H, *kept, *sums)
        ctx.rows, ctx.half, ctx.kept, ctx.vocab_size, ctx.temperature = rows, half, len(kept), vocab_size, temperature
        ctx.entropy = entropy
        return torch.cat(picked), H

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropies: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, targets, H, *kept = ctx.saved_tensors
        grad_hidden: list[Tensor] = []
        grad_head = torch.zeros(head.shape, device=head.device, dtype=torch.float32)
        wanted = targets != IGNORE_INDEX
        grad_logprobs = grad_logprobs * wanted
        grad_entropies = grad_entropies * wanted if ctx.entropy else grad_entropies
        for number, i in enumerate(range(0, hidden.shape[0], ctx.rows)):
            part = slice(i, min(i + ctx.rows, hidden.shape[0]))
            if ctx.kept:
                logp = kept[number] - kept[ctx.kept + number] if ctx.half else kept[number]
            else:
                logp = _logits(hidden[part], head, ctx.vocab_size, ctx.temperature)
                logp = logp.log_softmax(-1, dtype=torch.float32)
            g = grad_logprobs[part, None]
            # d logp[y] / d z = onehot(y) - p;   d H / d z = -p (logp + H)
            if ctx.entropy:
                dz = -logp.exp() * (g + grad_entropies[part, None] * (logp + H[part, None]))
            else:
                dz = logp.exp().mul_(-g)  # kept chunks stay as they are: backward may run twice
            dz = _add_at(dz, targets[part, None].clamp(min=0), g)
            if ctx.temperature != 1.0:
                dz /= ctx.temperature
            dz = dz.to(hidden.dtype)
            if ctx.needs_input_grad[0]:
                grad_hidden.append(product(dz, head.T))
            if ctx.needs_input_grad[1]:
                grad_head += product(dz.T, hidden[part].T)
        return (
            torch.cat(grad_hidden) if ctx.needs_input_grad[0] else None,
            grad_head.to(head.dtype) if ctx.needs_input_grad[1] else None,
            None,
            None,
            None,
            None,
        )


def _add_at(dz: Tensor, index: Tensor, g: Tensor) -> Tensor:
    """dz (rows, V) with g (rows, 1) added at index (rows, 1)."""
    if torch.compiler.is_compiling():  # in the same sweep
        return dz + torch.where(torch.arange(dz.shape[1], device=dz.device) == index, g, 0.0)
    return dz.scatter_add_(1, index, g)


def _logits(hidden: Tensor, head: Tensor, vocab_size: int, temperature: float) -> Tensor:
    """(rows, padded vocabulary), as multiplied: widths that the hardware likes. No padded column is ever likely."""
    logits = product(hidden, head)
    if temperature != 1.0:
        logits = logits / temperature
    logits[:, vocab_size:] = NEVER
    return logits

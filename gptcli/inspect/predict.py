"""Distributions over the next token: the model's, what sampling makes of it, and each layer's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcli.config.schema import SamplingParams
from gptcli.generate.processors import Processors
from gptcli.generate.scheduler import window_start
from gptcli.model import GPT


@torch.no_grad()
def next_logits(model: GPT, ids: Sequence[int]) -> Tensor:
    """(V,): after `ids`, of which the model sees as much as when it generates."""
    view = ids[window_start(len(ids), model.config.context_length) :]
    logits = model(torch.tensor([list(view)], device=model.wte.weight.device), last_only=True).logits
    assert logits is not None
    return logits[0, -1].float()


def sampled_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """(V,): how often sampling from logits (V,) picks each token, penalties for what was written apart."""
    if params.temperature == 0.0:
        return F.one_hot(logits.argmax(), len(logits)).float()
    return Processors(params, len(logits)).warp(logits[None])[0].softmax(-1)


@torch.no_grad()
def lens(model: GPT, residual: Tensor) -> Tensor:
    """Logits (..., V) of a residual (..., C), as if no block followed (nostalgebraist 2020, "the logit lens").

    GPT-1's stream is normalised inside every block, so it has no final norm to apply.
    """
    normed = residual if model.ln_f is None else model.ln_f(residual)
    return F.linear(normed, model.head_weight)[..., : model.vocab_size].float()


def layer_names(model: GPT) -> list[str]:
    """Of residual_stream's rows; blocks are numbered as in the weights' names."""
    return ["embedding", *(f"layer {i}" for i in range(model.config.n_layer))]


def entropy(logits: Tensor) -> Tensor:
    """(...) nats, of logits (..., V)."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)

"""What a model computes on its way, caught from the real forward: attention weights and the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gptcli.model import GPT


@torch.no_grad()
def attention_weights(model: GPT, ids: Sequence[int]) -> Tensor:
    """(n_layer, H, T, T), fp32: row t is how token t shares its attention among the tokens up to it."""
    with _AttentionOfIdentity() as seen:
        model(_row(model, ids))
    return torch.cat(seen.weights).float()


@torch.no_grad()
def residual_stream(model: GPT, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The stream (n_layer + 1, T, C), into the first block and after each, and the logits (T, V)."""
    stream: list[Tensor] = []
    with ExitStack() as hooks:
        hooks.enter_context(model.h[0].register_forward_pre_hook(lambda block, inputs: stream.append(inputs[0])))
        for block in model.h:
            hooks.enter_context(block.register_forward_hook(lambda block, inputs, output: stream.append(output)))
        logits = model(_row(model, ids)).logits
    assert logits is not None
    return torch.cat(stream), logits[0]


def _row(model: GPT, ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(ids)], device=model.wte.weight.device)


class _AttentionOfIdentity(TorchFunctionMode):
    """Asks every attention once more, with the identity for values: the weights come out as it computes them.

    So masks, bands, ALiBi, scale, rotary angles and shared heads need no second implementation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = args
            identity = torch.eye(k.shape[-2], dtype=v.dtype, device=v.device).expand(*k.shape[:2], -1, -1)
            self.weights.append(func(q, k, identity, **kwargs))
        return func(*args, **kwargs)

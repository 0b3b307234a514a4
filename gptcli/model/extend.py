"""A trained model made into another: a longer context, other scalar heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from gptcli.config.schema import ModelConfig, RopeScaling
from gptcli.errors import UserError
from gptcli.randomness import derive


def extend_context(
    config: ModelConfig, weights: Mapping[str, Tensor], length: int
) -> tuple[ModelConfig, dict[str, Tensor], str]:
    """Config and weights with `length` tokens of context, and in words how. Further training should follow.

    learned: the table is repeated (Beltagy et al. 2020, Longformer, section 5), so short texts compute as before.
    rope: position interpolation (Chen et al. 2023, section 2.3). alibi, sinusoidal, none: nothing to change.
    """
    old, out = config.context_length, dict(weights)
    if length < old:
        raise UserError(f"context_length: {length} is less than the checkpoint's {old}; train.seq_len shortens rows")
    if length == old:
        return config, out, "as it was"
    longer = dataclasses.replace(config, context_length=length)
    if config.position == "learned":
        table = weights["wpe.weight"]
        out["wpe.weight"] = table.repeat(-(-length // old), 1)[:length].contiguous()
        return longer, out, f"the {old} learned positions are repeated"
    if config.position == "rope":
        before = config.rope_scaling or RopeScaling(factor=1.0)
        if before.kind != "linear":
            raise UserError(f"context_length: rope_scaling {before.kind} cannot be stretched further")
        scaling = dataclasses.replace(before, factor=before.factor * length / old)
        return (
            dataclasses.replace(longer, rope_scaling=scaling),
            out,
            f"rotary positions are divided by {length / old:g}",
        )
    return longer, out, f"positions ({config.position}) go on as they are"


def with_heads(
    config: ModelConfig, weights: Mapping[str, Tensor], heads: Mapping[str, float], seed: int
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and weights with exactly these heads of width 1. One that is there already keeps its weights; a new one
    gets bias 0 and weights of this standard deviation, drawn from the seed."""
    out = {name: t for name, t in weights.items() if not name.startswith("scalar_heads.")}
    for name, std in heads.items():
        weight, bias = f"scalar_heads.{name}.weight", f"scalar_heads.{name}.bias"
        if config.scalar_heads.get(name) == 1:
            out |= {weight: weights[weight], bias: weights[bias]}
        else:
            generator = torch.Generator().manual_seed(derive(seed, f"init {weight}"))
            out[weight] = std * torch.randn(1, config.n_embd, generator=generator)
            out[bias] = torch.zeros(1)
    return dataclasses.replace(config, scalar_heads=dict.fromkeys(heads, 1)), out

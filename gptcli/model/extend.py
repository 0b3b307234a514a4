"""A longer context for a model that was trained with a shorter one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from gptcli.config.schema import ModelConfig, RopeScaling
from gptcli.errors import UserError


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

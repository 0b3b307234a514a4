"""A longer context, or a larger vocabulary, for a model that was trained with less."""

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


def extend_vocab(
    config: ModelConfig, weights: Mapping[str, Tensor], vocab_size: int
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and weights with rows for new tokens at the end. Each begins as the mean of the known ones (Hewitt 2021,
    "Initializing New Word Embeddings"): as likely as an average token, so that nothing else's odds change much."""
    old, out = config.vocab_size, dict(weights)
    assert old is not None
    assert vocab_size >= old
    larger = dataclasses.replace(config, vocab_size=vocab_size)
    for name in ("wte.weight", "lm_head.weight"):
        if name in weights and vocab_size > old:
            known = weights[name][:old]
            table = known.mean(0).repeat(larger.padded_vocab, 1)
            table[:old] = known
            out[name] = table
    return larger, out

"""What a trained model gets afterwards: a longer context, rows for new tokens, other scalar heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from gptcli.config.schema import ModelConfig, RopeScaling
from gptcli.errors import UserError
from gptcli.randomness import derive

NEW_STD = 0.02  # of what GPT-1 adds to a trained model for its tasks


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


def add_token_rows(
    config: ModelConfig, weights: Mapping[str, Tensor], new: range, seed: int
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and weights with fresh embedding rows for the ids in `new`: N(0, 0.02) in a post-norm model, as in GPT-1's
    finetuning. Where a norm follows the embedding, as large as the rows that are there: the gradient of rows twenty
    times smaller would be twenty times larger, and most of the norm that is clipped."""
    assert config.vocab_size is not None
    larger = dataclasses.replace(config, vocab_size=max(config.vocab_size, new.stop))
    out = dict(weights)
    for name in ("wte.weight", "lm_head.weight"):
        if name in weights and new:
            known = weights[name][: new.start]
            std = NEW_STD if config.norm_position == "post" else known.std().item()
            table = fresh(f"new rows of {name}", (larger.padded_vocab, config.n_embd), seed, std=std).to(known)
            table[: new.start] = known
            out[name] = table
    return larger, out


def add_task_head(
    config: ModelConfig, weights: Mapping[str, Tensor], name: str, width: int, seed: int, *, segments: bool
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and weights with one head, of this name and width, in place of any others; with or without a segment
    embedding of the two sides of a delimiter."""
    out = {n: t for n, t in weights.items() if not n.startswith("scalar_heads.")}
    out[f"scalar_heads.{name}.weight"] = fresh(f"head {name}", (width, config.n_embd), seed)
    out[f"scalar_heads.{name}.bias"] = torch.zeros(width)
    if not segments:
        out.pop("wse.weight", None)
    elif config.n_segment != 2:
        out["wse.weight"] = fresh("segments", (2, config.n_embd), seed)
    return dataclasses.replace(config, scalar_heads={name: width}, n_segment=2 if segments else 0), out


def fresh(purpose: str, shape: tuple[int, ...], seed: int, *, std: float = NEW_STD) -> Tensor:
    """N(0, std), the same for the same seed."""
    generator = torch.Generator().manual_seed(derive(seed, purpose))
    return torch.empty(shape).normal_(0.0, std, generator=generator)


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

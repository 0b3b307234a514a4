"""Adapters as the `peft` library keeps them: adapter_model.safetensors and adapter_config.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gptcli.config.schema import LoraBlock, ModelConfig
from gptcli.errors import UserError
from gptcli.model.convert.families import family_for
from gptcli.model.convert.layouts import NANOGPT, Layout, places
from gptcli.model.lora import LORA_A, LORA_B, NEW_ROWS, Adapter

PREFIX = "base_model.model."
TOKENS = "token_adapter.trainable_tokens_delta"
# What peft can do beside plain low-rank updates, and the value that means it does not.
PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_bias": False,
}


def layout_of(config: ModelConfig) -> Layout:
    """Hugging Face's names for this shape; GPT-2's names where no type of theirs has it."""
    try:
        return family_for(config, "").layout
    except UserError:
        return NANOGPT


def modules_of(layout: Layout, config: ModelConfig) -> Iterator[tuple[str, list[str], tuple[int, ...]]]:
    """Of each module with a matrix: our name, their full names, and each one's share of our rows. Heads and segment
    embeddings are ours alone."""
    for name, place in places(layout, dataclasses.replace(config, scalar_heads={}, n_segment=0)).items():
        if name.endswith(".weight"):
            prefix = PREFIX if name == "lm_head.weight" else PREFIX + layout.prefix
            yield name.removesuffix(".weight"), [prefix + t.removesuffix(".weight") for t in place.theirs], place.rows


def to_peft(
    config: ModelConfig, lora: LoraBlock, adapter: Mapping[str, Tensor], new_ids: Sequence[int], base: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json and the tensors. A layer of ours that is several of theirs (c_attn: q, k, v) gives each the
    same A and its own rows of B."""
    layout, left = layout_of(config), dict(adapter)
    tensors: dict[str, Tensor] = {}
    targets, rows_of = set(), {}
    for module, theirs, rows in modules_of(layout, config):
        if (a := left.pop(f"{module}.{LORA_A}", None)) is not None:
            b = left.pop(f"{module}.{LORA_B}")
            for name, part in zip(theirs, b.split(list(rows)), strict=True):
                tensors[f"{name}.{LORA_A}.weight"], tensors[f"{name}.{LORA_B}.weight"] = a.clone(), part
            targets |= set(layout.inside[module.split(".", 2)[2]])
        if (new := left.pop(f"{module}.{NEW_ROWS}", None)) is not None:
            tensors[f"{theirs[0]}.{TOKENS}"] = new
            rows_of[layout.outside[module]] = list(new_ids)
    tensors |= {PREFIX + name: tensor for name, tensor in left.items()}
    tree = {
        **PLAIN,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(targets),
        "fan_in_fan_out": layout.transposed,
        "inference_mode": True,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in left}) or None,
        "trainable_token_indices": rows_of or None,
    }
    return tree, tensors


def from_peft(config: ModelConfig, tree: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Adapter:
    """The adapter under our names. Raises UserError for what is no plain low-rank update of this model."""
    for key, plain in PLAIN.items():
        if tree.get(key) not in (plain, None):
            raise UserError(f"{where}: {key}: {tree[key]!r} is not supported, only {plain!r}")
    out, left, new_ids = {}, dict(tensors), list[int]()
    for module, theirs, rows in modules_of(layout_of(config), config):
        pairs = [(left.pop(f"{t}.{LORA_A}.weight", None), left.pop(f"{t}.{LORA_B}.weight", None)) for t in theirs]
        if any(a is not None for a, _ in pairs):
            out[f"{module}.{LORA_A}"], out[f"{module}.{LORA_B}"] = _joined(pairs, rows)
        if (new := left.pop(f"{theirs[0]}.{TOKENS}", None)) is not None:
            out[f"{module}.{NEW_ROWS}"] = new
            new_ids = _ids_of_rows(tree.get("trainable_token_indices"), config, len(new), where)
    for name in [n for n in left if n.startswith(PREFIX) and ".lora_" not in n]:
        out[name.removeprefix(PREFIX)] = left.pop(name)
    if left:
        raise UserError(f"{where}: does not fit this model: unexpected tensor {min(left)!r} ({len(left)} too many)")
    scale = tree["lora_alpha"] / (math.sqrt(tree["r"]) if tree.get("use_rslora") else tree["r"])
    return Adapter(out, scale, new_ids)


def _ids_of_rows(told: Any, config: ModelConfig, count: int, where: str) -> list[int]:
    """peft names them once, or for each module; with us all modules have the same."""
    ids = next(iter(told.values()), None) if isinstance(told, dict) else told
    if not isinstance(ids, list) or len(ids) != count or not all(0 <= i < (config.vocab_size or 0) for i in ids):
        raise UserError(f"{where}: trainable_token_indices: {count} ids of tokens are expected, one for each row")
    if isinstance(told, dict) and any(other != ids for other in told.values()):
        raise UserError(f"{where}: trainable_token_indices: the same tokens are expected for every module")
    return ids


def _joined(pairs: list[tuple[Tensor | None, Tensor | None]], rows: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """One A and B for layers that are one of ours. Where they share A, so does it; else the As are stacked, and B
    gives each layer's rows the columns of its own A."""
    present = [a for a, _ in pairs if a is not None]
    if len(present) == len(pairs) and all(torch.equal(a, present[0]) for a in present):
        return present[0], torch.cat([b for _, b in pairs if b is not None])
    blocks = [b if b is not None else present[0].new_zeros(n, 0) for (_, b), n in zip(pairs, rows, strict=True)]
    return torch.cat(present), torch.block_diag(*blocks)

"""Hugging Face's model types that this project's one module can be, as a table, and configs from and to theirs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gptcli.config.load import build
from gptcli.config.schema import ModelConfig, RopeScaling
from gptcli.config.validate import check_model
from gptcli.errors import UserError
from gptcli.model.convert import layouts
from gptcli.model.convert.layouts import Layout

GELU_NAMES = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
}
# What no Hugging Face type of ours has, whatever its family.
PLAIN: dict[str, Any] = {"qk_norm": False, "n_segment": 0, "scalar_heads": {}}


@dataclass(frozen=True)
class Family:
    """One model type: what it fixes, and how its config names what it leaves open."""

    model_type: str
    architecture: str
    layout: Layout
    fixed: Mapping[str, Any]
    keys: Mapping[str, str]  # our key -> theirs
    activation_key: str
    activations: Mapping[str, str]  # theirs -> ours
    dropout_keys: tuple[str, ...] = ()
    refused: Mapping[str, Any] = field(default_factory=dict)  # their key -> the only value that can be had here
    buffers: str = r"$^"  # regular expression of tensors in files that are no weights
    defaults: Mapping[str, Any] = field(default_factory=dict)  # their key -> its value where config.json leaves it out


_GPT2_KEYS = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "context_length": "n_positions",
    "vocab_size": "vocab_size",
    "norm_eps": "layer_norm_epsilon",
    "init_std": "initializer_range",
}
_GPT_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_LEARNED = {"position": "learned", "rope_scaling": None, "norm": "layernorm", "bias": True, "n_kv_head": None}
_DENSE = {"attention_pattern": "dense", "band_width": None, "qkv_bias": None}

FAMILIES: dict[str, Family] = {
    f.model_type: f
    for f in (
        Family(
            "gpt2",
            "GPT2LMHeadModel",
            layouts.GPT2,
            {**_LEARNED, **_DENSE, "norm_position": "pre"},
            {
                **_GPT2_KEYS,
                "n_inner": "n_inner",
                "scale_attention": "scale_attn_weights",
                "tie_embeddings": "tie_word_embeddings",
            },
            "activation_function",
            GELU_NAMES,
            _GPT_DROPOUTS,
            {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
            r"h\.\d+\.attn\.(bias|masked_bias)",
            defaults={"activation_function": "gelu_new", "tie_word_embeddings": True, "layer_norm_epsilon": 1e-5},
        ),
        Family(
            "openai-gpt",
            "OpenAIGPTLMHeadModel",
            layouts.GPT1,
            {
                **_LEARNED,
                **_DENSE,
                "norm_position": "post",
                "scale_attention": True,
                "tie_embeddings": True,
                "n_inner": None,
            },
            _GPT2_KEYS,
            "afn",
            {"gelu": "gelu_tanh", "relu": "relu"},  # its "gelu" is the tanh form
            _GPT_DROPOUTS,
            buffers=r"h\.\d+\.attn\.bias|position_ids",
            defaults={"afn": "gelu", "layer_norm_epsilon": 1e-5},
        ),
        Family(
            "gpt_neo",
            "GPTNeoForCausalLM",
            layouts.GPT_NEO,
            {**_LEARNED, "qkv_bias": False, "norm_position": "pre", "scale_attention": False},
            {
                "n_layer": "num_layers",
                "n_head": "num_heads",
                "n_embd": "hidden_size",
                "context_length": "max_position_embeddings",
                "vocab_size": "vocab_size",
                "n_inner": "intermediate_size",
                "norm_eps": "layer_norm_epsilon",
                "init_std": "initializer_range",
                "tie_embeddings": "tie_word_embeddings",
            },
            "activation_function",
            GELU_NAMES,
            ("resid_dropout", "embed_dropout", "attention_dropout"),
            buffers=r"h\.\d+\.attn\.attention\.(bias|masked_bias)",
            defaults={"activation_function": "gelu_new", "tie_word_embeddings": True, "window_size": 256},
        ),
        Family(
            "llama",
            "LlamaForCausalLM",
            layouts.LLAMA,
            {
                **_DENSE,
                "position": "rope",
                "norm": "rmsnorm",
                "norm_position": "pre",
                "bias": False,
                "scale_attention": True,
            },
            {
                "n_layer": "num_hidden_layers",
                "n_head": "num_attention_heads",
                "n_kv_head": "num_key_value_heads",
                "n_embd": "hidden_size",
                "context_length": "max_position_embeddings",
                "vocab_size": "vocab_size",
                "n_inner": "intermediate_size",
                "norm_eps": "rms_norm_eps",
                "init_std": "initializer_range",
                "tie_embeddings": "tie_word_embeddings",
            },
            "hidden_act",
            {"silu": "swiglu"},
            ("attention_dropout",),
            {"attention_bias": False, "mlp_bias": False},
            r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
            defaults={"hidden_act": "silu", "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
        ),
    )
}


# ---- from theirs ----------------------------------------------------------------------------------------------


def family_of(tree: Mapping[str, Any], where: str) -> Family:
    kind = tree.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{where}: model_type {kind!r} cannot be imported; known are {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def config_from(family: Family, tree: Mapping[str, Any], where: str) -> ModelConfig:
    """Our config of their config.json. Raises UserError naming the key that is missing or cannot be had."""
    tree = {**family.defaults, **tree}
    for name, only in family.refused.items():
        if tree.get(name, only) != only:
            raise UserError(f"{where}: {name}: {tree[name]!r} is not supported, only {only!r}")
    values: dict[str, Any] = {**PLAIN, **family.fixed, "vocab_pad_multiple": 1}
    for ours, theirs in family.keys.items():
        if theirs in tree:
            values[ours] = tree[theirs]
        elif ours in ("n_layer", "n_head", "n_embd", "context_length", "vocab_size"):
            raise UserError(f"{where}: {theirs}: missing")
    activation = tree[family.activation_key]
    if activation not in family.activations:
        known = ", ".join(family.activations)
        raise UserError(f"{where}: {family.activation_key}: {activation!r} is not supported (known: {known})")
    values["activation"] = family.activations[activation]
    values["dropout"] = max((float(tree.get(name) or 0) for name in family.dropout_keys), default=0.0)
    if family.model_type == "gpt_neo":
        values |= _neo_pattern(tree, where)
    if family.model_type == "llama":
        values |= _rope_from(tree, where)
        if values.get("n_kv_head") == values["n_head"]:
            values["n_kv_head"] = None
    config = build(ModelConfig, values, where=where)
    check_model(config, where)
    if tree.get("head_dim") not in (None, config.head_dim):
        raise UserError(f"{where}: head_dim: {tree['head_dim']} is not hidden_size / num_attention_heads")
    return config


def _neo_pattern(tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    """GPT-Neo lists each layer's kind; we have all global, all local, and global first in turn."""
    kinds = tree.get("attention_layers")
    if kinds is None:
        groups = tree.get("attention_types") or [[["global", "local"], tree["num_layers"] // 2]]
        kinds = [kind for pattern, times in groups for _ in range(times) for kind in pattern]
    window = {"band_width": tree["window_size"]}
    if len(kinds) != tree["num_layers"] or not set(kinds) <= {"global", "local"}:
        raise UserError(f"{where}: attention_types: does not give each of {tree['num_layers']} layers global or local")
    if set(kinds) == {"global"}:
        return {"attention_pattern": "dense", "band_width": None}
    if set(kinds) == {"local"}:
        return {"attention_pattern": "banded", **window}
    if all((kind == "local") == (i % 2 == 1) for i, kind in enumerate(kinds)):
        return {"attention_pattern": "alternating", **window}
    raise UserError(f"{where}: attention_types: only global, local, or global and local in turn are supported")


def _rope_from(tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    """rope_theta and rope_scaling, or rope_parameters, which holds both."""
    given = tree.get("rope_parameters") or {"rope_theta": tree["rope_theta"], **(tree.get("rope_scaling") or {})}
    kind = given.get("rope_type", given.get("type", "default"))
    out: dict[str, Any] = {"rope_theta": float(given.get("rope_theta", tree["rope_theta"])), "rope_scaling": None}
    if kind == "default":
        return out
    if kind not in ("linear", "llama3"):
        raise UserError(f"{where}: rope_scaling: {kind!r} is not supported (known: linear, llama3)")
    names = {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_context_length": "original_max_position_embeddings",
    }
    try:
        values = {ours: given[theirs] for ours, theirs in names.items() if kind == "llama3" or ours == "factor"}
    except KeyError as missing:
        raise UserError(f"{where}: rope_scaling: {missing.args[0]} is missing") from None
    return out | {"rope_scaling": {"kind": kind, **values}}


def strip(family: Family, tensors: Mapping[str, Tensor], config: ModelConfig, where: str) -> dict[str, Tensor]:
    """Their tensors without the prefix, buffers and the copy of a tied head. Raises UserError if a head that
    should be the token embedding is not."""
    prefix, buffers = family.layout.prefix, re.compile(family.buffers)
    named = {name.removeprefix(prefix): t for name, t in tensors.items()}
    out = {name: t for name, t in named.items() if not buffers.fullmatch(name)}
    head, embedding = out.get("lm_head.weight"), out.get(f"{family.layout.outside['wte']}.weight")
    if config.tie_embeddings and head is not None and embedding is not None:
        if head.shape != embedding.shape or not torch.equal(head, embedding):
            raise UserError(f"{where}: lm_head.weight differs from the embedding that its config ties it to")
        del out["lm_head.weight"]
    return out


# ---- to theirs ------------------------------------------------------------------------------------------------


def with_zero_biases(config: ModelConfig, weights: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The same function with every bias present, those that were not there 0: GPT-1 and GPT-2 always have them."""
    full = dataclasses.replace(config, bias=True, qkv_bias=None)
    some = next(iter(weights.values()))
    shapes = layouts.parameter_shapes(full)
    return full, {
        name: weights[name] if name in weights else torch.zeros(shape, dtype=some.dtype)
        for name, shape in shapes.items()
    }


def needs_zero_biases(family: Family, config: ModelConfig) -> bool:
    return _always_biased(family) and not (config.bias and config.has_qkv_bias)


def _always_biased(family: Family) -> bool:
    return bool(family.fixed["bias"]) and family.fixed["qkv_bias"] is None


def mismatches(family: Family, config: ModelConfig) -> list[str]:
    """What this config has that the family cannot: `key: value (there: value)`."""
    fixed = {**PLAIN, **family.fixed}
    if _always_biased(family) and config.norm == "layernorm":
        fixed.pop("bias"), fixed.pop("qkv_bias")  # zeros stand in for those that are missing
    shown = {"n_kv_head": config.n_kv_head if config.kv_heads != config.n_head else None}
    shown["n_inner"] = config.n_inner if config.inner != 4 * config.n_embd else None
    shown["qkv_bias"] = config.qkv_bias if config.has_qkv_bias != config.bias else None
    out = []
    for name, there in fixed.items():
        ours = shown[name] if name in shown else getattr(config, name)
        if ours != there:
            out.append(f"{name}: {_word(ours)} (there: {_word(there)})")
    if config.activation not in family.activations.values():
        out.append(f"activation: {config.activation} (there: {', '.join(dict.fromkeys(family.activations.values()))})")
    return out


def family_for(config: ModelConfig, where: str) -> Family:
    """The type that has this shape. Raises UserError with the nearest one and what it lacks."""
    problems = {name: mismatches(family, config) for name, family in FAMILIES.items()}
    if fitting := [FAMILIES[name] for name, lacks in problems.items() if not lacks]:
        return min(fitting, key=lambda family: needs_zero_biases(family, config))
    nearest = min(problems, key=lambda name: len(problems[name]))
    raise UserError(
        f"{where}: no Hugging Face architecture has this shape; the nearest is {nearest}, but this model has "
        + ", ".join(problems[nearest])
    )


def config_to(family: Family, config: ModelConfig) -> dict[str, Any]:
    """Their config.json, without token ids."""
    tree: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": "float32",
    }
    values = {**{name: getattr(config, name) for name in family.keys}}
    if "n_inner" in values:
        values["n_inner"] = config.inner
    if "n_kv_head" in values:
        values["n_kv_head"] = config.kv_heads
    tree |= {theirs: values[ours] for ours, theirs in family.keys.items()}
    tree[family.activation_key] = next(name for name, ours in family.activations.items() if ours == config.activation)
    tree |= dict.fromkeys(family.dropout_keys, config.dropout)
    if family.model_type == "gpt_neo":
        pattern = {"dense": ["global"], "banded": ["local"], "alternating": ["global", "local"]}
        kinds = [
            pattern[config.attention_pattern][i % len(pattern[config.attention_pattern])] for i in range(config.n_layer)
        ]
        tree["attention_types"] = [[[kind], 1] for kind in kinds]
        tree["attention_layers"] = kinds
        tree["window_size"] = config.band_width or config.context_length
    if family.model_type == "llama":
        tree |= {"attention_bias": False, "mlp_bias": False, "rope_theta": config.rope_theta}
        tree["rope_scaling"] = _rope_to(config.rope_scaling)
    return tree


def _rope_to(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context_length,
    }


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "none" if value is None else str(value)

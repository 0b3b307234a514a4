"""Where our tensors lie in other formats. One table a format, read in both directions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gptcli.config.schema import ModelConfig
from gptcli.errors import UserError
from gptcli.model.gpt import GPT


@dataclass(frozen=True)
class Layout:
    """Names of the modules: outside the blocks, and in a block whose names begin with `block`.

    A module of ours may be split over several of theirs, whose rows it stacks: c_attn is q, k, v; a gated c_fc is
    gate, up. transposed: their matrices inside the blocks are (in, out).
    """

    block: str
    outside: Mapping[str, str]
    inside: Mapping[str, tuple[str, ...]]
    transposed: bool = False
    prefix: str = ""  # before all names but the head's; some files leave it out


@dataclass(frozen=True)
class Place:
    """Their tensors whose rows, one after the other, are one parameter of ours."""

    theirs: tuple[str, ...]
    rows: tuple[int, ...]
    transposed: bool


def _named_as_ours(*modules: str) -> dict[str, tuple[str, ...]]:
    return {module: (module,) for module in modules}


_BLOCK = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
_GPT2_OUTSIDE = {"wte": "wte", "wpe": "wpe", "ln_f": "ln_f", "lm_head": "lm_head"}

GPT2 = Layout("h.{}.", _GPT2_OUTSIDE, _named_as_ours(*_BLOCK), transposed=True, prefix="transformer.")
NANOGPT = Layout("h.{}.", _GPT2_OUTSIDE, _named_as_ours(*_BLOCK), prefix="transformer.")
GPT1 = Layout(
    "h.{}.",
    {"wte": "tokens_embed", "wpe": "positions_embed"},
    _named_as_ours(*_BLOCK),
    transposed=True,
    prefix="transformer.",
)
GPT_NEO = Layout(
    "h.{}.",
    _GPT2_OUTSIDE,
    {
        **_named_as_ours(*_BLOCK),
        "attn.c_attn": ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
        "attn.c_proj": ("attn.attention.out_proj",),
    },
    prefix="transformer.",
)
LLAMA = Layout(
    "layers.{}.",
    {"wte": "embed_tokens", "ln_f": "norm", "lm_head": "lm_head"},
    {
        "ln_1": ("input_layernorm",),
        "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn.c_proj": ("self_attn.o_proj",),
        "ln_2": ("post_attention_layernorm",),
        "mlp.c_fc": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.c_proj": ("mlp.down_proj",),
    },
    prefix="model.",
)
_GGUF_OUTSIDE = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output"}
_GGUF_BLOCK = {
    "ln_1": ("attn_norm",),
    "attn.c_proj": ("attn_output",),
    "ln_2": ("ffn_norm",),
    "mlp.c_proj": ("ffn_down",),
}
GGUF_GPT2 = Layout("blk.{}.", _GGUF_OUTSIDE, {**_GGUF_BLOCK, "attn.c_attn": ("attn_qkv",), "mlp.c_fc": ("ffn_up",)})
GGUF_LLAMA = Layout(
    "blk.{}.",
    _GGUF_OUTSIDE,
    {**_GGUF_BLOCK, "attn.c_attn": ("attn_q", "attn_k", "attn_v"), "mlp.c_fc": ("ffn_gate", "ffn_up")},
)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our parameters' names and shapes, without building the model."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}


def places(layout: Layout, config: ModelConfig) -> dict[str, Place]:
    """For each parameter of this config its place in the layout. Names carry no prefix."""
    out = {}
    for name, shape in parameter_shapes(config).items():
        module, _, kind = name.rpartition(".")
        if module.startswith("h."):
            _, layer, module = module.split(".", 2)
            theirs = tuple(f"{layout.block.format(layer)}{m}.{kind}" for m in layout.inside[module])
            transposed = layout.transposed and len(shape) == 2
        else:
            theirs, transposed = (f"{layout.outside[module]}.{kind}",), False
        out[name] = Place(theirs, _rows(module, len(theirs), shape[0], config), transposed)
    return out


def _rows(module: str, parts: int, total: int, config: ModelConfig) -> tuple[int, ...]:
    if parts == 1:
        return (total,)
    if module == "attn.c_attn":
        q, kv = config.n_head * config.head_dim, config.kv_heads * config.head_dim
        return (q, kv, kv)
    return (total // parts,) * parts


def to_ours(layout: Layout, config: ModelConfig, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Our weights from their tensors (names without prefix). Raises UserError for a missing, unexpected or
    wrong-shaped tensor."""
    shapes, out, used = parameter_shapes(config), {}, set()
    for name, place in places(layout, config).items():
        parts = []
        for theirs, rows in zip(place.theirs, place.rows, strict=True):
            if theirs not in tensors:
                raise UserError(f"{where}: does not fit its config: no tensor {theirs!r}")
            part = tensors[theirs].T if place.transposed else tensors[theirs]
            expected = (rows, *shapes[name][1:])
            if tuple(part.shape) != expected:
                said = expected[::-1] if place.transposed else expected
                raise UserError(f"{where}: {theirs} is {tuple(tensors[theirs].shape)}, its config says {said}")
            parts.append(part)
            used.add(theirs)
        out[name] = (torch.cat(parts) if len(parts) > 1 else parts[0]).contiguous()
    if extra := sorted(tensors.keys() - used):
        raise UserError(f"{where}: does not fit its config: unexpected tensor {extra[0]!r} ({len(extra)} too many)")
    return out


def to_theirs(layout: Layout, config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors from our weights, vocabulary padding cut off; names with the prefix."""
    out = {}
    for name, place in places(layout, config).items():
        weight = weights[name]
        if name in ("wte.weight", "lm_head.weight"):
            weight = weight[: config.vocab_size]
            parts: Iterable[Tensor] = [weight]
        else:
            parts = weight.split(list(place.rows))
        for theirs, part in zip(place.theirs, parts, strict=True):
            full = theirs if theirs.startswith("lm_head.") else layout.prefix + theirs
            out[full] = (part.T if place.transposed else part).contiguous()
    return out

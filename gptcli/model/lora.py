"""Low-rank updates (Hu et al. 2021, "LoRA"): y = W x + (alpha / rank) B A x, where only A and B are trained.

The base keeps its parameters and their names; A and B lie beside them: h.0.attn.c_attn.lora_A, .lora_B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcli.config.schema import LoraBlock
from gptcli.errors import UserError, nearest
from gptcli.model.attention import drop
from gptcli.model.gpt import GPT
from gptcli.model.linear import Linear, linear
from gptcli.randomness import derive

LORA_A, LORA_B = "lora_A", "lora_B"
NEW_ROWS = "new_rows"
FRESH = ("scalar_heads.", "wse.")  # what finetuning adds to a model: trained whole


class LoRALinear(Linear):
    """A linear layer whose own weights are frozen. It begins as the base: B is zero."""

    def __init__(self, base: nn.Linear, lora: LoraBlock, seed: int) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.dropout = lora.alpha / lora.rank, lora.dropout
        bound = 1 / math.sqrt(base.in_features)  # as nn.Linear begins
        a = torch.empty(lora.rank, base.in_features)
        a.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
        self.lora_A = nn.Parameter(a.to(base.weight.device))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, lora.rank))

    def forward(self, x: Tensor) -> Tensor:
        low = linear(drop(x, self.dropout, self.training), self.lora_A)
        return super().forward(x) + linear(low, self.lora_B) * self.scale


class GrownEmbedding(nn.Module):
    """An embedding (or output head) of which only the rows of new tokens are trained."""

    def __init__(self, base: nn.Embedding | nn.Linear, rows: range) -> None:
        super().__init__()
        self.base, self.rows = base, rows
        self.new_rows = nn.Parameter(base.weight.detach()[rows.start : rows.stop].clone())

    @property
    def weight(self) -> Tensor:
        frozen = self.base.weight
        return torch.cat([frozen[: self.rows.start], self.new_rows, frozen[self.rows.stop :]])

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


def add_lora(model: GPT, lora: LoraBlock, seed: int, *, new_tokens: range = range(0)) -> None:
    """Freeze the model but for an update beside each target, the embeddings of `new_tokens`, and fresh heads. Raises
    UserError for a target that names no linear layer."""
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(FRESH))
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("h.")
    }
    for name in targeted(list(linears), lora.targets):
        parent, _, child = name.rpartition(".")
        setattr(
            model.get_submodule(parent), child, LoRALinear(linears[name], lora, derive(seed, f"init {name}.lora_A"))
        )
    if new_tokens:
        for name in ("wte", "lm_head"):
            if (module := getattr(model, name)) is not None:
                setattr(model, name, GrownEmbedding(module, new_tokens))


def targeted(names: Sequence[str], targets: Sequence[str]) -> list[str]:
    """The modules that some target names by its last words: c_proj, or attn.c_proj alone."""
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            known = sorted({name.split(".", 2)[2] for name in names})
            hint = nearest(target, known) or f"; known: {', '.join(known)}"
            raise UserError(f"lora.targets: {target!r} names no linear layer of this model{hint}")
    return [name for name in names if any(f".{name}".endswith(f".{target}") for target in targets)]


class Adapter(NamedTuple):
    """A low-rank update of a model, and what was trained whole beside it."""

    weights: dict[str, Tensor]  # by our names
    scale: float  # of the updates
    new_ids: Sequence[int]  # the tokens that the rows called new_rows belong to


def new_ids(model: GPT) -> range:
    """The tokens whose rows are trained."""
    return model.wte.rows if isinstance(model.wte, GrownEmbedding) else range(0)


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """What is trained: the adapter, without its base."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_adapter(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put weights that `adapter_weights` gave back into a model with the same updates."""
    mine = adapter_weights(model)
    assert mine.keys() == weights.keys()
    for name, p in mine.items():
        p.copy_(weights[name])


def merged(base: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """The weights with the adapter worked in. Rows of new tokens take their places; any other tensor (a fresh head)
    stands for itself."""
    out = dict(base)
    for name, tensor in adapter.weights.items():
        module, _, kind = name.rpartition(".")
        weight = f"{module}.weight"
        if kind == LORA_B:
            out[weight] = base[weight] + adapter.scale * (tensor @ adapter.weights[f"{module}.{LORA_A}"])
        elif kind == NEW_ROWS:
            out[weight] = base[weight].clone()
            out[weight][list(adapter.new_ids)] = tensor
        elif kind != LORA_A:
            out[name] = tensor
    return out

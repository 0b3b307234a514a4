"""AdamW with weight-decay groups, Muon for the hidden matrices, and their state by parameter name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from gptcli.config.schema import OptimBlock
from gptcli.train.muon import Muon

EMBEDDINGS = ("wte.", "wpe.", "wse.")


class Optimizers:
    """One or two torch optimizers that step together; learning rates are peak x factor."""

    def __init__(self, named: dict[str, nn.Parameter], optimizers: list[torch.optim.Optimizer]) -> None:
        self._names = {p: name for name, p in named.items()}
        self._optimizers = optimizers
        for group in self._groups():
            group["peak_lr"] = group["lr"]

    def _groups(self) -> Iterator[dict]:
        for optimizer in self._optimizers:
            yield from optimizer.param_groups

    def parameters(self) -> Iterable[nn.Parameter]:
        return self._names.keys()

    def set_lr(self, factor: float) -> None:
        for group in self._groups():
            group["lr"] = group["peak_lr"] * factor

    def step(self) -> None:
        for optimizer in self._optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """`exp_avg/h.0.attn.c_attn.weight` and the like: every tensor of state, addressed by parameter name."""
        out = {}
        for optimizer in self._optimizers:
            for p, state in optimizer.state.items():
                for kind, value in state.items():
                    out[f"{kind}/{self._names[cast(nn.Parameter, p)]}"] = torch.as_tensor(value)
        return out

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    suffix = "/" + self._names[p]
                    mine = {k[: -len(suffix)]: t for k, t in tensors.items() if k.endswith(suffix)}
                    # AdamW's step counter lives on the CPU unless the update is fused on a device.
                    moved = {k: t.to(p.device) if t.ndim or p.device.type != "cpu" else t for k, t in mine.items()}
                    if moved:
                        optimizer.state[p] = moved


def make_optimizer(model: nn.Module, optim: OptimBlock, hidden_matrices: Iterable[str] = ()) -> Optimizers:
    """The recipe's optimizer over the model's trainable parameters."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = set(hidden_matrices) & named.keys() if optim.name == "muon" else set()
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, p in named.items():
        if name in hidden:
            continue
        embedding = name.startswith(EMBEDDINGS)
        (decay if p.ndim >= 2 and (optim.decay_embeddings or not embedding) else no_decay).append(p)
    groups = [
        {"params": decay, "weight_decay": optim.weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if kept := [g for g in groups if g["params"]]:
        fused = all(p.device.type in ("cpu", "cuda") for p in named.values())
        optimizers.append(torch.optim.AdamW(kept, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused))
    if hidden:
        fused_names = {name for name in hidden if name.endswith("attn.c_attn.weight")}
        whole, threefold = ([named[name] for name in sorted(names)] for names in (hidden - fused_names, fused_names))
        optimizers.append(
            Muon(whole, threefold, lr=optim.muon_lr, momentum=optim.muon_momentum, weight_decay=optim.weight_decay)
        )
    return Optimizers(named, optimizers)

"""Muon: momentum whose update is orthogonalised (Jordan et al. 2024, "Muon: An optimizer for hidden layers")."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gptcli.config.memory import MUON_BATCH_ELEMENTS

# Quintic Newton-Schulz coefficients of the Muon post: singular values land in about [0.7, 1.2] after five steps.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Replace the singular values of (..., m, n) by about 1.

    In bf16 on CUDA; elsewhere in the matrices' own precision, because bf16 is emulated on most CPUs.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * (gram @ gram)) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, for weight matrices (out, in) alone.

    A fused query-key-value matrix (C + 2 of keys' width, C), of `fused`, is three matrices and is treated as such. The
    update of a matrix taller than wide grows by sqrt(out / in), which keeps the step's effect on activations alike
    across shapes.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        fused: Iterable[nn.Parameter] = (),
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        groups = [{"params": list(params), "fused": False}, {"params": list(fused), "fused": True}]
        groups = [group for group in groups if group["params"]]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                buffer = state["momentum"].lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(buffer, momentum)
                p.mul_(1 - lr * group["weight_decay"])
                rows, C = p.shape
                parts = [C, (rows - C) // 2, (rows - C) // 2] if group["fused"] else [rows]
                for part in zip(p.split(parts), update.split(parts), strict=True):
                    by_shape.setdefault(part[0].shape, []).append(part)
            # The layers' matrices of one shape go through the iteration as one batch.
            for (rows, columns), pairs in by_shape.items():
                scale = max(1.0, rows / columns) ** 0.5
                at_once = max(1, MUON_BATCH_ELEMENTS // (rows * columns))
                for i in range(0, len(pairs), at_once):
                    batch = pairs[i : i + at_once]
                    updates = orthogonalize(torch.stack([update for _, update in batch]))
                    for (p, _), update in zip(batch, updates, strict=True):
                        p.add_(update, alpha=-lr * scale)

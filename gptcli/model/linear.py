"""Matrix products by the library that is fastest on this CPU.

torch multiplies fp32 matrices with MKL, which treats AMD's AVX-512 as if it were AVX2: 210 GFLOP/s on two cores of a
Zen 5, where oneDNN, which torch brings too, gives 480. There `linear` goes to oneDNN; everywhere else it is F.linear.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gptcli.config.gpus import cpu_vendor

WORTH = 1 << 21  # multiplications from which oneDNN's longer way to a product pays
ONEDNN_IS_FASTER = (
    cpu_vendor() == "AuthenticAMD"
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and torch.backends.mkl.is_available()
    and torch.backends.mkldnn.is_available()
)


class Linear(nn.Linear):
    """nn.Linear; the same numbers up to the order of sums."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times weight (N, K) transposed, plus bias (N,)."""
    if not _by_onednn(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _OneDNNLinear.apply(x, weight, bias)
    return _onednn(x, weight, bias)


def gelu_of(layer: nn.Module, x: Tensor, approximate: str) -> Tensor:
    """F.gelu of a layer's output. oneDNN makes both in one pass, where no gradient is wanted: on 1024 rows of 512 that
    takes 0.37 ms, one after the other 0.61."""
    if type(layer) is Linear and not torch.is_grad_enabled() and _by_onednn(x, layer.weight):
        return _onednn(x, layer.weight, layer.bias, approximate)
    return F.gelu(layer(x), approximate=approximate)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) times b (N, K) transposed, where no gradient is wanted. Either may be a transposed view."""
    return _onednn_views(a, b) if _by_onednn(a, b) else a @ b.T


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        ONEDNN_IS_FASTER
        and x.numel() * weight.shape[0] >= WORTH
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: str = "") -> Tensor:
    """gelu: what F.gelu calls `approximate`, where it is to follow."""
    return (_opaque if torch.compiler.is_compiling() else _product)(x, weight, bias, gelu)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], gelu)


# torch.compile takes oneDNN's op for one of its own, on weights that it has packed itself.
torch.library.define("gptcli::onednn_linear", "(Tensor x, Tensor weight, Tensor? bias, str gelu) -> Tensor")
torch.library.impl("gptcli::onednn_linear", "CPU", _product)
_opaque = torch.ops.gptcli.onednn_linear.default


@torch.library.register_fake("gptcli::onednn_linear")
def _shape(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _onednn_views(a: Tensor, b: Tensor) -> Tensor:
    """oneDNN copies its first operand if that is a view: let it be the smaller."""
    if a.is_contiguous() or a.numel() <= b.numel():
        return _onednn(a, b)
    return _onednn(b, a).T


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)  # (M, N)
        grad_x = _onednn(rows, weight.T).view_as(x) if ctx.needs_input_grad[0] else None
        grad_weight = _onednn_views(rows.T, x.flatten(0, -2).T) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, rows.sum(0) if ctx.needs_input_grad[2] else None

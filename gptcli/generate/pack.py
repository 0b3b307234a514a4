"""Faster forms of a model's matrices for generation on a CPU: oneDNN's blocked layout, or int8.

One token at a time reads every weight once, so decoding runs at the speed of memory: a layout that is read in order
is 1.5 times as fast here, and int8 reads a quarter of the bytes. The model can then no longer be trained.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcli.model import GPT

WIDE = 1 << 15  # outputs from which oneDNN's int8 product is faster than fbgemm's, which goes over them twice
LARGE = 1 << 19  # elements of a matrix from which oneDNN's layout pays: each call of it takes 50 microseconds more


class BlockedLinear(nn.Module):
    """nn.Linear with its weight in oneDNN's layout; the same numbers up to the order of sums.

    `weight` is kept where a head needs it for log-probabilities too; tied, it is the embedding and costs nothing.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, keep: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = weight if keep else None, bias
        self.blocked = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.blocked, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """nn.Linear with int8 weights, one scale per output, and activations rounded with one scale per row of the batch.

    So rows do not influence one another, and one large activation does not cost the others their precision. On a
    CPU it computes in int8 (prompts by fbgemm, a wide head by oneDNN; the rest by native.c); elsewhere the weights are
    stored as int8 and widened for each product.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.scale = (weight.abs().amax(1) / 127).clamp(min=1e-12)
        self.bias, self.packed, self.wide = bias, None, None
        self.int8 = (weight / self.scale[:, None]).round().to(torch.int8)
        self.sums = self.int8.sum(1, dtype=torch.int32)
        # Without VNNI, sums of two int8 products overflow unless activations keep to 7 bits.
        self.levels = 127 if torch.cpu._is_vnni_supported() else 63
        if weight.device.type != "cpu":
            return
        zeros = torch.zeros(len(weight), dtype=torch.long)
        if len(weight) >= WIDE and self.levels == 127 and torch.backends.mkldnn.is_available():
            self.wide = torch.ops.onednn.qlinear_prepack(self.int8, None), self.scale, zeros
        else:
            with warnings.catch_warnings():  # quantized tensors are deprecated; fbgemm has no other door yet
                warnings.simplefilter("ignore")
                quantized = torch.quantize_per_channel(weight, self.scale, zeros, 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(quantized, None)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None and self.wide is None:
            y = F.linear(x, self.int8.to(x.dtype)) * self.scale.to(x.dtype)
            return y if self.bias is None else y + self.bias
        largest = x.abs().amax(-1, keepdim=True).clamp_(min=1e-12)
        y = self._multiply(x / largest)
        return y.mul_(largest) if self.bias is None else torch.addcmul(self.bias, y, largest)

    def _multiply(self, x: Tensor) -> Tensor:
        """x lies in -1 to 1."""
        scale, zero = 1 / self.levels, self.levels + 1
        if self.wide is not None:
            rounded = (x * self.levels).round_().add_(zero).to(torch.uint8)
            op = torch.ops.onednn.qlinear_pointwise
            return op(rounded, scale, zero, *self.wide, None, 1.0, 0, torch.float32, "none", [], "")
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, scale, zero, self.packed)

    @property
    def weight(self) -> Tensor:
        return self.int8 * self.scale[:, None]


def pack(model: GPT, *, int8: bool = False) -> GPT:
    """Replace the linear layers and the head of `model`, in place. Embeddings and norms stay as they are."""
    form = Int8Linear if int8 else BlockedLinear
    head = model.head_weight.detach()[: model.vocab_size]
    if not int8 and not can_block(model):
        return model

    def pays(weight: Tensor) -> bool:
        return int8 or weight.numel() >= LARGE

    if pays(head):
        model.packed_head = Int8Linear(head, None) if int8 else BlockedLinear(head, None, keep=True)
    for module in [m for m in model.h.modules() if not isinstance(m, nn.Linear)]:
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and pays(child.weight):
                setattr(module, name, form(child.weight.detach(), None if child.bias is None else child.bias.detach()))
    return model


def can_block(model: GPT) -> bool:
    """oneDNN's layout is for fp32 on a CPU that has it."""
    weight = model.wte.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()

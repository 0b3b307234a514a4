"""Language modelling; with IGNORE_INDEX in the targets, supervised finetuning."""

from __future__ import annotations

from torch import nn

from gptcli.contracts import Batch, LossSum

OPTIONAL = ("attention_mask", "position_ids", "segment_ids", "document_ids")


def next_token(model: nn.Module, batch: Batch) -> LossSum:
    """-sum log p(target), over the targets that count. Batch: tokens, targets (B, T), optional masks and ids."""
    extra = {name: batch.tensors[name] for name in OPTIONAL if name in batch.tensors}
    output = model(batch["tokens"], targets=batch["targets"], **extra)
    return LossSum(-output.logprobs.sum())

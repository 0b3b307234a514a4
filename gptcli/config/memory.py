"""Bytes a training step needs, by formula; the base of `micro_batch_size: auto` and of refusing what cannot fit."""

from __future__ import annotations

from gptcli.config.flops import count_params
from gptcli.config.schema import ModelConfig

STATE_BYTES = 16  # fp32 weights, gradients and AdamW's two moments
KEPT_LOGITS = 256 << 20


def state_bytes(model: ModelConfig) -> int:
    """Weights, gradients and optimizer state."""
    return STATE_BYTES * count_params(model)


def activation_bytes(model: ModelConfig, rows: int, seq_len: int, *, half: bool) -> int:
    """What the forward pass keeps for the backward: about 8 residual-wide and 2 MLP-wide tensors a layer, attention
    without its T x T matrix, and the logits as far as they are kept (model/logprobs.py)."""
    width = 2 if half else 4
    per_token = model.n_layer * (8 * model.n_embd + 2 * model.inner) * width + 4 * model.n_embd * width
    if model.dropout:
        per_token += model.n_layer * (3 * model.n_embd * width + model.n_head * seq_len * (width + 1))
    logits = 4 * rows * seq_len * model.padded_vocab
    return rows * seq_len * per_token + (2 * logits if logits <= KEPT_LOGITS else KEPT_LOGITS)

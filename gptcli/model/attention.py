"""Causal self-attention, dense or locally banded, with heads that may share keys, with or without a cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcli.config.schema import ModelConfig
from gptcli.model.kv_cache import Cache, CacheStep
from gptcli.model.linear import Linear
from gptcli.model.positions import alibi_slopes, rotate

MANY_KEYS = 256  # of all rows, from which three small calls instead of one pay


@dataclass(frozen=True)
class Visibility:
    """Which keys each query may see, made once per forward and shared by the layers.

    A mask is (B or 1, 1, T, S), True = visible; with ALiBi it is (B or 1, H, T, S), added to the scores. None means
    plain causal (or, for one cached token, everything).
    """

    dense: Tensor | None
    banded: Tensor | None
    is_causal: bool


def visibility(
    config: ModelConfig,
    tokens: Tensor,
    attention_mask: Tensor | None,
    document_ids: Tensor | None,
    step: CacheStep | None,
) -> Visibility:
    T, device = tokens.shape[1], tokens.device
    if step is not None:
        dense_is_plain = step.uniform and (T == 1 or step.start == 0)
    else:
        dense_is_plain = attention_mask is None and document_ids is None
    alibi = config.position == "alibi"
    dense_is_plain = dense_is_plain and not alibi
    if dense_is_plain and config.band_width is None:
        return Visibility(None, None, is_causal=T > 1)
    if step is not None:
        queries, keys = step.slots[:, :, None], torch.arange(step.end, device=device)
        if step.uniform:
            queries = queries[:1]
        allowed = keys <= queries
    else:
        queries, keys = torch.arange(T, device=device)[None, :, None], torch.arange(T, device=device)
        allowed = keys <= queries
        if document_ids is not None:
            allowed = allowed & (document_ids[:, :, None] == document_ids[:, None, :])
        if attention_mask is not None:
            # a padded query sees itself, so that no row of the softmax is empty
            allowed = allowed & attention_mask.bool()[:, None, :] | (keys == queries)
    banded = None
    if config.band_width is not None:
        banded = (allowed & (keys > queries - config.band_width))[:, None]
    dense = None if dense_is_plain else allowed[:, None]
    if alibi:
        distance = (queries - keys)[:, None].to(torch.float32)  # (B or 1, 1, T, S)
        bias = -alibi_slopes(config.n_head, device=device)[:, None, None] * distance
        dense, banded = (None if m is None else bias.masked_fill(~m, -torch.inf) for m in (dense, banded))
    return Visibility(dense, banded, is_causal=dense_is_plain and T > 1)


def drop(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout that costs nothing while generating: a call that does nothing takes longer than a small matrix."""
    return F.dropout(x, p) if training and p else x


class Attention(nn.Module):
    """Multi-head attention ("Attention Is All You Need", section 3.2), keys and values shared by groups of heads
    where n_kv_head says so (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.n_head, self.kv_heads, self.head_dim = layer, config.n_head, config.kv_heads, config.head_dim
        self.banded = config.is_banded(layer)
        self.qk_norm, self.dropout = config.qk_norm, config.dropout
        self.scale = None if config.scale_attention else 1.0
        width = (config.n_head + 2 * config.kv_heads) * config.head_dim  # rows of c_attn: queries, keys, values
        self.c_attn = Linear(config.n_embd, width, bias=config.has_qkv_bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        see: Visibility,
        rotary: tuple[Tensor, Tensor] | None,
        cache: Cache | None,
        step: CacheStep | None,
    ) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split_with_sizes([self.n_head, self.kv_heads, self.kv_heads], dim=1)  # (B, H or kv heads, T, D)
        if self.qk_norm:
            q, k = F.rms_norm(q, (self.head_dim,)), F.rms_norm(k, (self.head_dim,))
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None and step is not None:
            k, v = cache.update(self.layer, k, v, step)
            q = q.to(k.dtype)
        mask = see.banded if self.banded else see.dense
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        if _by_products(q, k):
            y = attend_once(q, k, v, mask, self.head_dim**-0.5 if self.scale is None else self.scale)
        else:
            y = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=see.is_causal and mask is None,
                dropout_p=self.dropout if self.training else 0.0,
                scale=self.scale,
                enable_gqa=self.kv_heads != self.n_head,
            )
        y = y.transpose(1, 2).reshape(B, T, C).to(qkv.dtype)
        return drop(self.c_proj(y), self.dropout, self.training)


def _by_products(q: Tensor, k: Tensor) -> bool:
    """One query a row, on a CPU: torch's fused kernel takes 1.3 to 2.5 times as long as two products of matrices."""
    if q.shape[2] > 1 or q.device.type != "cpu" or torch.is_grad_enabled():
        return False
    return q.dtype == torch.float32 and k.shape[0] * k.shape[2] >= MANY_KEYS


def attend_once(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of one query a row, q (B, H, 1, D); (B, H, 1, D)."""
    B, H, _, D = q.shape
    q = (q * scale).view(B, k.shape[1], -1, D)  # (B, kv heads, heads that share them, D)
    scores = q @ k.mT  # (B, kv heads, sharing, S)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.view(-1, *scores.shape[1:])
    return (scores.softmax(-1) @ v).view(B, H, 1, D)

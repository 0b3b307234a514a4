"""A decoder-only transformer. GPT-1, 2 and 3, GPT-Neo and Llama are this module with different configs.

Shapes: B rows, T tokens, C = n_embd, H heads, D = C / H, V = vocab_size. S: keys a query can see.
Modules carry GPT-2's names, so that its checkpoints load by name.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcli.config.schema import ModelConfig
from gptcli.model.attention import Attention, Visibility, drop, visibility
from gptcli.model.kv_cache import Cache, CacheStep
from gptcli.model.linear import Linear, gelu_of, linear
from gptcli.model.logprobs import measure_targets, token_logprobs
from gptcli.model.positions import default_positions, rotary_angles, sinusoids
from gptcli.randomness import derive

GELU = {"gelu": "none", "gelu_tanh": "tanh"}  # activation -> what F.gelu calls `approximate`


class Output(NamedTuple):
    """Given targets: logprobs (and entropy), logits is None. Without: logits (B, T, V), logprobs is None."""

    logits: Tensor | None
    logprobs: Tensor | None  # (B, T), nats, 0 where the target is IGNORE_INDEX
    entropy: Tensor | None  # (B, T), nats
    scalars: dict[str, Tensor]  # head name -> (B, T, width)
    greedy: Tensor | None = None  # (B, T), whether the target is the likeliest token; on request


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation, self.dropout = config.activation, config.dropout
        gated = 2 if config.activation == "swiglu" else 1  # rows of c_fc: gate, then up
        self.c_fc = Linear(config.n_embd, gated * config.inner, bias=config.bias)
        self.c_proj = Linear(config.inner, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation in GELU:
            h = gelu_of(self.c_fc, x, GELU[self.activation])
        else:
            h = activate(self.c_fc(x), self.activation)
        return drop(self.c_proj(h), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm: x + f(LN(x)). Post-norm (GPT-1): LN(x + f(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.post = config.norm_position == "post"
        self.ln_1 = make_norm(config)
        self.attn = Attention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        see: Visibility,
        rotary: tuple[Tensor, Tensor] | None,
        cache: Cache | None,
        step: CacheStep | None,
    ) -> Tensor:
        if self.post:
            x = self.ln_1(x + self.attn(x, see, rotary, cache, step))
            return self.ln_2(x + self.mlp(x))
        x = x + self.attn(self.ln_1(x), see, rotary, cache, step)
        return x + self.mlp(self.ln_2(x))


class Embedding(nn.Embedding):
    """Left as it is on the meta device, where drawing its weights would import torch's compiler (seconds)."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class GPT(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None
        self.config, self.vocab_size = config, config.vocab_size
        self.wte = Embedding(config.padded_vocab, config.n_embd)
        self.wpe = Embedding(config.context_length, config.n_embd) if config.position == "learned" else None
        self.wse = Embedding(config.n_segment, config.n_embd) if config.n_segment else None
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = make_norm(config) if config.norm_position == "pre" else None
        self.lm_head = None if config.tie_embeddings else Linear(config.n_embd, config.padded_vocab, bias=False)
        self.packed_head: nn.Module | None = None  # see generate/pack.py
        heads = {name: nn.Linear(config.n_embd, width) for name, width in config.scalar_heads.items()}
        self.scalar_heads = nn.ModuleDict(heads)

    def forward(
        self,
        tokens: Tensor,
        *,
        targets: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
        temperature: float = 1.0,
        entropy: bool = False,
        last_only: bool = False,
        greedy: bool = False,
    ) -> Output:
        """One pass over `tokens` (B, T).

        targets (B, T): ids already shifted, IGNORE_INDEX where none. attention_mask (B, T): True = a real token.
        position_ids (B, T): left out, the place among the row's (or its document's) real tokens. document_ids
        (B, T): tokens see their own document only. cache: earlier keys and values, extended by this call.
        temperature divides logits before log-probabilities. last_only: logits of each row's last real token.
        greedy: for measuring, without a gradient: log-probabilities of the targets as they are, and Output.greedy.
        """
        step = cache.begin(tokens, attention_mask) if cache is not None else None
        if position_ids is None:
            position_ids = default_positions(tokens, attention_mask, document_ids, step)
        see = visibility(self.config, tokens, attention_mask, document_ids, step)
        rotary = rotary_angles(self.config, position_ids) if self.config.position == "rope" else None

        x = self.wte(tokens)  # (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe(position_ids)
        elif self.config.position == "sinusoidal":
            x = x * math.sqrt(x.shape[-1]) + sinusoids(self.config, position_ids).to(x.dtype)
        if self.wse is not None and segment_ids is not None:
            x = x + self.wse(segment_ids)
        x = drop(x, self.config.dropout, self.training)
        for block in self.h:
            x = block(x, see, rotary, cache, step)
        if self.ln_f is not None:
            x = self.ln_f(x)
        if cache is not None and step is not None:
            cache.advance(step)

        scalars = {name: head(x) for name, head in self.scalar_heads.items()}
        if targets is not None and greedy:
            measured, likeliest = measure_targets(x, self.head_weight, targets, vocab_size=self.vocab_size)
            return Output(None, measured, None, scalars, likeliest)
        if targets is not None:
            logprobs, entropies = token_logprobs(
                x,
                self.head_weight,
                targets,
                vocab_size=self.vocab_size,
                temperature=temperature,
                entropy=entropy,
            )
            return Output(None, logprobs, entropies, scalars)
        if last_only:
            x = last_real(x, attention_mask)
        logits = (self.packed_head or self._head)(x)[..., : self.vocab_size]
        return Output(logits if temperature == 1.0 else logits / temperature, None, None, scalars)

    def _head(self, x: Tensor) -> Tensor:
        return linear(x, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        if self.packed_head is not None:
            return cast(Tensor, self.packed_head.weight)
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def hidden_matrices(self) -> list[str]:
        """Names of the weight matrices inside the blocks: what Muon orthogonalises."""
        return [name for name, p in self.named_parameters() if name.startswith("h.") and p.ndim == 2]

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Mean 0 and std init_std, biases 0, norms 1; the same weights for the same seed on every device."""
        config = self.config
        smaller = {"scaled": 1 / math.sqrt(2 * config.n_layer), "plain": 1.0, "zero": 0.0}[config.residual_init]
        for name, p in self.named_parameters():
            if p.ndim < 2:
                p.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            if name.startswith("scalar_heads."):
                std = 1 / math.sqrt(config.n_embd + 1)
            elif name == "wpe.weight" and config.wpe_init_std is not None:
                std = config.wpe_init_std
            else:
                std = config.init_std * (smaller if name.endswith("c_proj.weight") else 1.0)
            generator = torch.Generator().manual_seed(derive(seed, f"init {name}"))
            fresh = torch.empty(p.shape)
            if config.init == "uniform":
                p.copy_(fresh.uniform_(-std * math.sqrt(3), std * math.sqrt(3), generator=generator))
            else:
                p.copy_(fresh.normal_(0.0, std, generator=generator))


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


def activate(x: Tensor, kind: str) -> Tensor:
    if kind == "swiglu":
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    if kind == "relu":
        return F.relu(x)
    assert kind == "relu2"
    return F.relu(x).square()


def last_real(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(B, 1, C): the hidden state of each row's last token that is no padding."""
    if attention_mask is None:
        return x[:, -1:]
    T = x.shape[1]
    last = (torch.arange(T, device=x.device) * attention_mask.bool()).argmax(1)
    return x[torch.arange(x.shape[0], device=x.device), last][:, None]

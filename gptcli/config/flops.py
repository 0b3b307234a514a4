"""Parameters and arithmetic of a shape, by formula, without building it.

FLOPs follow the papers: 6 N per token (Kaplan et al. 2020, section 2.1), and PaLM's appendix B for MFU, which adds
12 n_layer n_embd seq_len for attention. One PF-day is 8.64e19 operations.
"""

from __future__ import annotations

from gptcli.config.schema import ModelConfig

PF_DAY = 8.64e19


def params_by_part(m: ModelConfig) -> dict[str, int]:
    """Parameters by part; vocabulary padding is not counted."""
    assert m.vocab_size is not None
    d, bias = m.n_embd, int(m.bias)
    norm = d * (1 + (bias if m.norm == "layernorm" else 0))
    attention, mlp = hidden_matrices(m)
    attention += m.n_layer * (qkv_width(m) * int(m.has_qkv_bias) + d * bias)
    mlp += m.n_layer * (up_width(m) + d) * bias
    parts = {
        "token_embedding": m.vocab_size * d,
        "position_embedding": m.context_length * d if m.position == "learned" else 0,
        "segment_embedding": m.n_segment * d,
        "attention": attention,
        "mlp": mlp,
        "norms": m.n_layer * 2 * norm + (norm if m.norm_position == "pre" else 0),
        "lm_head": 0 if m.tie_embeddings else m.vocab_size * d,
        "scalar_heads": sum(width * (d + 1) for width in m.scalar_heads.values()),
    }
    return {name: count for name, count in parts.items() if count}


def qkv_width(m: ModelConfig) -> int:
    """Rows of the matrix that makes queries, keys and values."""
    return (m.n_head + 2 * m.kv_heads) * m.head_dim


def up_width(m: ModelConfig) -> int:
    """Rows of the MLP's first matrix; a gated one makes gate and up."""
    return m.inner * (2 if m.activation == "swiglu" else 1)


def hidden_matrices(m: ModelConfig) -> tuple[int, int]:
    """Weights of the matrices inside the blocks, of attention and of the MLPs."""
    d = m.n_embd
    return m.n_layer * (d * qkv_width(m) + d * d), m.n_layer * (d * up_width(m) + m.inner * d)


def count_params(m: ModelConfig) -> int:
    return sum(params_by_part(m).values())


def count_non_embedding(m: ModelConfig) -> int:
    parts = params_by_part(m)
    return sum(n for name, n in parts.items() if not name.endswith("_embedding"))


def flops_per_token(m: ModelConfig) -> int:
    """6 N, with every parameter counted, as the GPT-3 paper's table D.1 does."""
    return 6 * count_params(m)


def flops_per_token_with_attention(m: ModelConfig, seq_len: int) -> int:
    """6 N + 12 n_layer n_embd seq_len, N without position embeddings: what MFU divides by."""
    n = count_params(m) - params_by_part(m).get("position_embedding", 0)
    return 6 * n + 12 * m.n_layer * m.n_embd * seq_len

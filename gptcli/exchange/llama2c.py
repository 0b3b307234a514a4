"""llama2.c's .bin files: a Llama as plain floats (legacy and version 1), and its tokenizer."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, processors
from torch import Tensor

from gptcli.config.schema import ModelConfig
from gptcli.config.validate import check_model
from gptcli.errors import UserError
from gptcli.tokenizer import Tokenizer

MAGIC = 0x616B3432  # "ak42", from version 1 on
NORM_EPS, ROPE_THETA = 1e-5, 10000.0
UNK, BOS, EOS = "<unk>", "<s>", "</s>"


def read_model(file: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and weights under our names. Raises UserError for a file that is none, cut short, or quantized."""
    data = np.memmap(file, dtype=np.uint8, mode="r") if file.stat().st_size else np.empty(0, np.uint8)
    if len(data) < 28:
        raise UserError(f"{file}: too short to be a llama2.c model")
    magic, version = struct.unpack("<Ii", data[:8].tobytes())
    if magic == MAGIC and version != 1:
        raise UserError(f"{file}: llama2.c version {version} (quantized) is not read; export it as version 0 or 1")
    legacy = magic != MAGIC
    start, body = (0, 28) if legacy else (8, 256)
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("<7i", data[start : start + 28].tobytes())
    shared = vocab > 0 if legacy else bool(data[36])
    vocab = abs(vocab)
    sizes = (dim, hidden, layers, heads, kv_heads, vocab, context)
    if not all(0 < n < 1 << 24 for n in sizes) or dim % heads or heads % kv_heads:
        raise UserError(f"{file}: not a llama2.c model (its header says {sizes})")
    config = ModelConfig(
        n_layer=layers, n_head=heads, n_kv_head=None if kv_heads == heads else kv_heads, n_embd=dim, n_inner=hidden,
        context_length=context, vocab_size=vocab, position="rope", rope_theta=ROPE_THETA, norm="rmsnorm",
        norm_eps=NORM_EPS, activation="swiglu", bias=False, tie_embeddings=shared, vocab_pad_multiple=1,
    )  # fmt: skip
    check_model(config, str(file))
    floats = data[body : body + (len(data) - body) // 4 * 4].view(np.float32)
    return config, _weights(config, _Reader(file, floats), legacy=legacy)


class _Reader:
    """Takes arrays off a row of floats, in the file's order."""

    def __init__(self, file: Path, floats: np.ndarray) -> None:
        self.file, self.floats, self.at = file, floats, 0

    def take(self, *shape: int) -> Tensor:
        count = int(np.prod(shape))
        if self.at + count > len(self.floats):
            raise UserError(f"{self.file}: cut short: its header asks for more than its {len(self.floats):,} floats")
        part = self.floats[self.at : self.at + count]
        self.at += count
        return torch.from_numpy(np.array(part, dtype=np.float32)).view(*shape)


def _weights(config: ModelConfig, read: _Reader, *, legacy: bool) -> dict[str, Tensor]:
    """Each kind of tensor stands for all layers in a row; version 1 puts the norms first."""
    assert config.vocab_size is not None
    L, C, D, inner = config.n_layer, config.n_embd, config.head_dim, config.inner
    kv = config.kv_heads * D
    part: dict[str, Tensor] = {}
    matrices = (
        ("q", (C, C)), ("k", (kv, C)), ("v", (kv, C)), ("o", (C, C)),
        ("ln_2", (C,)), ("gate", (inner, C)), ("down", (C, inner)), ("up", (inner, C)),
    )  # fmt: skip
    if legacy:
        part["wte"] = read.take(config.vocab_size, C)
        part["ln_1"] = read.take(L, C)
        for name, shape in matrices:
            part[name] = read.take(L, *shape)
        part["ln_f"] = read.take(C)
        read.take(2, config.context_length, D // 2)  # tables of cosines and sines
    else:
        part["ln_1"], part["ln_2"], part["ln_f"] = read.take(L, C), read.take(L, C), read.take(C)
        part["wte"] = read.take(config.vocab_size, C)
        for name, shape in matrices:
            if name != "ln_2":
                part[name] = read.take(L, *shape)
    out = {"wte.weight": part["wte"], "ln_f.weight": part["ln_f"]}
    if not config.tie_embeddings:
        out["lm_head.weight"] = read.take(config.vocab_size, C)
    for i in range(L):
        q, k = (halves_from_pairs(part[name][i], D) for name in ("q", "k"))
        out[f"h.{i}.ln_1.weight"], out[f"h.{i}.ln_2.weight"] = part["ln_1"][i], part["ln_2"][i]
        out[f"h.{i}.attn.c_attn.weight"] = torch.cat([q, k, part["v"][i]])
        out[f"h.{i}.attn.c_proj.weight"] = part["o"][i]
        out[f"h.{i}.mlp.c_fc.weight"] = torch.cat([part["gate"][i], part["up"][i]])
        out[f"h.{i}.mlp.c_proj.weight"] = part["down"][i]
    return {name: t.contiguous() for name, t in out.items()}


def halves_from_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Rows (heads x D, in) of a query or key whose rotary pairs are neighbours (0, 1), (2, 3), ... so that they are
    (0, D/2), (1, D/2 + 1), ... as here and in Hugging Face's Llama."""
    rows = weight.view(-1, head_dim // 2, 2, weight.shape[1])
    return rows.transpose(1, 2).reshape(weight.shape)


def pairs_from_halves(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `halves_from_pairs`."""
    rows = weight.view(-1, 2, head_dim // 2, weight.shape[1])
    return rows.transpose(1, 2).reshape(weight.shape)


# ---- tokenizer ------------------------------------------------------------------------------------------------


def tokenizers_beside(file: Path, config: ModelConfig) -> list[Path]:
    """llama2.c's usual names: tok512.bin for a vocabulary of 512, else tokenizer.bin."""
    names = (f"tok{config.vocab_size}.bin", "tokenizer.bin")
    return [file.parent / name for name in names if (file.parent / name).is_file()]


def read_tokenizer(file: Path) -> Tokenizer:
    """llama2.c's tokenizer.bin: (score, length, bytes) per token. Its rule, merge the best-scored pair first, is BPE
    with the merges in the order of their scores; unknown characters fall back to bytes."""
    pieces, scores = _read_pieces(file)
    vocab = {piece: i for i, piece in enumerate(pieces)}
    if len(vocab) != len(pieces) or pieces[:3] != [UNK, BOS, EOS]:
        raise UserError(f"{file}: not a llama2.c tokenizer")
    splits = []
    for piece, i in vocab.items():
        for cut in range(1, len(piece)):
            if (left := piece[:cut]) in vocab and (right := piece[cut:]) in vocab:
                splits.append((-scores[i], vocab[left], vocab[right], left, right))
    merges = [(left, right) for *_, left, right in sorted(splits)]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=UNK, fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in (UNK, BOS, EOS)])
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])])
    return Tokenizer(backend, {"unk": UNK, "bos": BOS, "eos": EOS})


def _read_pieces(file: Path) -> tuple[list[str], list[float]]:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    pieces, scores, at = [], [], 4
    try:
        while at < len(data):
            score, length = struct.unpack_from("<fi", data, at)
            raw = data[at + 8 : at + 8 + length]
            if len(raw) != length:
                raise ValueError("cut short")
            # the specials are written with line breaks round them, spaces as spaces
            text = raw.decode()
            pieces.append(text.strip("\n") if text in (f"\n{BOS}\n", f"\n{EOS}\n") else text.replace(" ", "▁"))
            scores.append(score)
            at += 8 + length
    except (struct.error, ValueError) as error:
        raise UserError(f"{file}: not a llama2.c tokenizer ({error})") from error
    return pieces, scores

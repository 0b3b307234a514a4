"""One file for llama.cpp, through the `gguf` package: GPT-2 and Llama shapes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptcli.config.schema import ModelConfig
from gptcli.errors import UserError
from gptcli.exchange.llama2c import halves_from_pairs, pairs_from_halves
from gptcli.model.convert.families import FAMILIES, mismatches, with_zero_biases
from gptcli.model.convert.layouts import GGUF_GPT2, GGUF_LLAMA, Layout, parameter_shapes, to_ours, to_theirs
from gptcli.model.positions import stretched
from gptcli.tokenizer import Tokenizer

if TYPE_CHECKING:
    import gguf

# Pre-tokenizers that llama.cpp knows, by their regular expression.
LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError("--format gguf: needs the gguf package: pip install 'gptcli[gguf]'") from None
    return gguf


def prepare(config: ModelConfig, weights: Mapping[str, Tensor], where: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The same model without vocabulary padding, and with GPT-2's biases. Raises UserError for a shape that
    llama.cpp does not have."""
    lacks = min((mismatches(FAMILIES[name], config) for name in ("gpt2", "llama")), key=len)
    if lacks:
        raise UserError(f"{where}: GGUF has GPT-2 and Llama shapes only, but this model has " + ", ".join(lacks))
    if not config.scale_attention or config.activation not in ("gelu_tanh", "gelu", "swiglu"):
        raise UserError(f"{where}: llama.cpp's gpt2 scales its attention and uses GELU; this model does not")
    if config.norm == "layernorm":
        config, weights = with_zero_biases(config, weights)
    config = dataclasses.replace(config, vocab_pad_multiple=1)
    shapes = parameter_shapes(config)
    return config, {name: weights[name][: shape[0]] for name, shape in shapes.items()}


def write(
    file: Path, config: ModelConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer | None, *, name: str
) -> list[str]:
    """Write the file; returns notes for the user."""
    gguf = _package()
    is_llama = config.position == "rope"
    writer = gguf.GGUFWriter(file, "llama" if is_llama else "gpt2")
    writer.add_name(name)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.inner)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_vocab_size(config.vocab_size)
    if is_llama:
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_theta)
    else:
        writer.add_layer_norm_eps(config.norm_eps)
    matrices = {t.dtype for n, t in weights.items() if t.ndim == 2}
    kinds = {torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}
    writer.add_file_type(
        gguf.LlamaFileType[kinds.get(matrices.pop() if len(matrices) == 1 else torch.float32, "ALL_F32")]
    )
    _add_rope_scaling(writer, config)
    notes = _add_tokenizer(writer, tokenizer, config)
    if config.activation == "gelu":
        notes.append("llama.cpp computes the tanh form of GELU, this model the exact one: logits differ slightly")
    for tensor_name, tensor in _tensors(config, weights).items():
        _add_tensor(gguf, writer, tensor_name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return notes


def _layout(config: ModelConfig) -> Layout:
    return GGUF_LLAMA if config.position == "rope" else GGUF_GPT2


def _tensors(config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """llama.cpp rotates neighbouring pairs, so queries and keys are reordered."""
    tensors = to_theirs(_layout(config), config, weights)
    for name in tensors:
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            tensors[name] = pairs_from_halves(tensors[name], config.head_dim)
    return tensors


def _add_tensor(gguf: Any, writer: gguf.GGUFWriter, name: str, tensor: Tensor) -> None:
    """Matrices keep their type; vectors are fp32, as llama.cpp wants them."""
    if tensor.dtype == torch.bfloat16 and tensor.ndim == 2:
        raw = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, (tensor if tensor.ndim == 2 else tensor.float()).contiguous().numpy())


def _add_rope_scaling(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    scaling = config.rope_scaling
    if scaling is None:
        return
    if scaling.kind == "linear":
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(scaling.factor)
        return
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    frequencies = 1.0 / config.rope_theta ** (half / config.head_dim)
    writer.add_tensor("rope_freqs.weight", (frequencies / stretched(frequencies, scaling)).numpy())


def read_weights(file: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Our weights from a file that `write` made."""
    gguf = _package()
    tensors = {}
    for t in gguf.GGUFReader(file).tensors:
        if t.name == "rope_freqs.weight":
            continue
        value = torch.from_numpy(t.data.copy())
        if t.tensor_type == gguf.GGMLQuantizationType.BF16:
            value = value.view(torch.bfloat16)
        if t.name.endswith(("attn_q.weight", "attn_k.weight")):
            value = halves_from_pairs(value, config.head_dim)
        tensors[t.name] = value
    return to_ours(_layout(config), config, tensors, str(file))


# ---- tokenizer ------------------------------------------------------------------------------------------------


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer | None, config: ModelConfig) -> list[str]:
    """The vocabulary in llama.cpp's terms; what it cannot express is left out, with a note."""
    tree = json.loads(tokenizer.backend.to_str()) if tokenizer is not None else {}
    model = tree.get("model", {})
    byte_fallback = bool(model.get("byte_fallback"))
    pre = None if byte_fallback else _pre_tokenizer(tree)
    if tokenizer is None or model.get("type") != "BPE" or not (byte_fallback or pre):
        writer.add_tokenizer_model("no_vocab")
        return [
            "the file holds no tokenizer: "
            + ("the model has none" if tokenizer is None else "llama.cpp has none of its kind")
        ]
    writer.add_tokenizer_model("llama" if byte_fallback else "gpt2")
    if pre:
        writer.add_tokenizer_pre(pre)
    pieces = _pieces(tokenizer, config)
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ", 1)) for m in model["merges"]]
    writer.add_token_list(pieces)
    writer.add_token_types(_token_types(tokenizer, pieces))
    if byte_fallback:
        ranks = {left + right: i for i, (left, right) in reversed(list(enumerate(merges)))}
        writer.add_token_scores([-float(ranks.get(piece, 0)) for piece in pieces])
        writer.add_add_space_prefix(True)
    else:
        writer.add_token_merges([f"{left} {right}" for left, right in merges])
    writer.add_add_bos_token(tokenizer.adds_bos)
    for role in tokenizer.special:
        token_id = tokenizer.backend.token_to_id(tokenizer.special[role])
        getattr(writer, f"add_{role}_token_id")(token_id)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
    return []


def _pre_tokenizer(tree: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of a byte-level tokenizer's splitting rule, None where it has none."""
    pre = tree.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    if [step.get("type") for step in steps] == ["ByteLevel"] and tree.get("normalizer") is None:
        return "gpt-2" if steps[0]["use_regex"] or not tree["model"]["merges"] else None
    if [step.get("type") for step in steps] == ["Split", "ByteLevel"] and not steps[1]["use_regex"]:
        return "llama-bpe" if steps[0]["pattern"].get("Regex") == LLAMA3_REGEX else None
    return None


def _pieces(tokenizer: Tokenizer, config: ModelConfig) -> list[str]:
    """Every id's token; ids that the tokenizer leaves open get a name of their own."""
    assert config.vocab_size is not None
    named = {i: piece for piece, i in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    return [named.get(i, f"[PAD{i}]") for i in range(config.vocab_size)]


def _token_types(tokenizer: Tokenizer, pieces: list[str]) -> list[int]:
    kinds = _package().TokenType
    known = tokenizer.backend.get_vocab(with_added_tokens=True)
    out = []
    for i, piece in enumerate(pieces):
        if piece not in known:
            out.append(kinds.UNUSED)
        elif piece == tokenizer.special.get("unk"):
            out.append(kinds.UNKNOWN)
        elif i in tokenizer.special_ids:
            out.append(kinds.CONTROL)
        elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            out.append(kinds.BYTE)
        else:
            out.append(kinds.NORMAL)
    return [int(kind) for kind in out]

"""Reading other people's checkpoints: Hugging Face and peft directories, nanoGPT's ckpt.pt. Nothing here unpickles."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcli import hub
from gptcli.config.load import build
from gptcli.config.schema import ModelConfig
from gptcli.config.validate import check_model
from gptcli.errors import UserError
from gptcli.exchange import llama2c
from gptcli.model.convert.families import config_from, family_of, strip
from gptcli.model.convert.layouts import NANOGPT, to_ours
from gptcli.model.lora import merged
from gptcli.modeldir import ADAPTER, ADAPTER_CONFIG, CONFIG, read_adapter, read_json, read_tensors
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.resolve import from_path

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"


@dataclass(frozen=True)
class Foreign:
    """A model from elsewhere, already under our names."""

    path: Path
    format: str  # as people call it: "Hugging Face gpt2", "nanoGPT", "llama2.c"
    config: ModelConfig
    weights: Mapping[str, Tensor]
    tokenizer: Tokenizer | None
    notes: list[str] = field(default_factory=list)
    hugging_face: bool = False  # so transformers can read it too


def read_foreign(source: str, *, tokenizer: str | None = None) -> Foreign:
    """A directory, a file or a hub id. `tokenizer` is a path to use instead of what lies beside the weights, or
    "none". Raises UserError for whatever cannot be read."""
    path = Path(source).expanduser()
    if not path.exists():
        path = hub.fetch_model(source)
    if path.is_dir() and (path / CONFIG).is_file():
        return _read_hugging_face(path, tokenizer)
    if path.is_dir() and (path / ADAPTER).is_file():
        return _read_peft(path, tokenizer)
    if path.is_dir() and (path / "ckpt.pt").is_file():
        path = path / "ckpt.pt"
    if path.is_dir():
        raise UserError(f"{path}: holds neither a {CONFIG} (Hugging Face) nor a ckpt.pt (nanoGPT)")
    if path.suffix in (".pt", ".pth"):
        return _read_nanogpt(path, tokenizer)
    if path.suffix == ".bin":
        config, weights = llama2c.read_model(path)
        spec = tokenizer or next((str(p) for p in llama2c.tokenizers_beside(path, config)), None)
        return Foreign(path, "llama2.c", config, weights, *_tokenizer_from(spec, path))
    raise UserError(f"{path}: not a directory with {CONFIG}, a nanoGPT .pt or a llama2.c .bin")


# ---- Hugging Face ---------------------------------------------------------------------------------------------


def _read_hugging_face(folder: Path, tokenizer: str | None) -> Foreign:
    file = folder / CONFIG
    tree = read_json(file, missing=f"{file}: missing")
    if tree.get("format") == "gptcli":
        raise UserError(f"{folder}: is a gptcli checkpoint already; every command takes it as it is")
    family = family_of(tree, str(file))
    config = config_from(family, tree, str(file))
    tensors = strip(family, _read_shards(folder), config, str(folder))
    weights = to_ours(family.layout, config, tensors, str(folder))
    if tokenizer is not None:
        found, notes = _tokenizer_from(tokenizer, folder)
    else:
        found, notes = _tokenizer_of(folder, tree)
    return Foreign(folder, f"Hugging Face {family.model_type}", config, weights, found, notes, hugging_face=True)


def _read_peft(folder: Path, tokenizer: str | None) -> Foreign:
    """An adapter of the peft library, merged into the model that it names."""
    file = folder / ADAPTER_CONFIG
    base = read_json(file, missing=f"{file}: missing").get("base_model_name_or_path")
    if not isinstance(base, str):
        raise UserError(f"{file}: base_model_name_or_path: missing; name the model that this adapter belongs to")
    whole = read_foreign(base, tokenizer=tokenizer)
    weights = merged(whole.weights, read_adapter(folder, whole.config))
    return dataclasses.replace(whole, path=folder, format="peft", weights=weights, hugging_face=False)


def _read_shards(folder: Path) -> dict[str, Tensor]:
    """All tensors of a directory, from one file or from the shards its index lists."""
    for name, read in ((SAFETENSORS, read_tensors), (PICKLED, read_pickled)):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return read(folder / name)
        if index.is_file():
            placed = read_json(index, missing="").get("weight_map")
            if not isinstance(placed, dict):
                raise UserError(f"{index}: holds no weight_map")
            out: dict[str, Tensor] = {}
            for shard in sorted(set(placed.values())):
                out |= read(folder / shard)
            if missing := sorted(placed.keys() - out.keys()):
                raise UserError(f"{index}: names tensor {missing[0]!r}, which {placed[missing[0]]} does not hold")
            return out
    raise UserError(f"{folder}: holds no {SAFETENSORS} and no {PICKLED}, whole or in shards")


def read_pickled(file: Path) -> dict[str, Any]:
    """A torch file, through the loader that builds tensors and plain containers only and runs nothing."""
    if not file.is_file():
        raise UserError(f"{file}: missing; this checkpoint is not complete")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and runtime errors, one for every way a file can be wrong
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "weights_only" in str(error) or "Unsupported" in str(error):
            reason = "it holds code or objects, not only tensors; nothing of it was run"
        raise UserError(f"{file}: refused: {reason}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{file}: holds a {type(tree).__name__}, not tensors by name")
    return tree


# ---- nanoGPT --------------------------------------------------------------------------------------------------


def _read_nanogpt(file: Path, tokenizer: str | None) -> Foreign:
    """nanoGPT's ckpt.pt: {"model": state dict, "model_args": {...}}, torch.compile's prefix taken off."""
    tree = read_pickled(file)
    arguments, state = tree.get("model_args"), tree.get("model")
    if not isinstance(arguments, dict) or not isinstance(state, dict):
        raise UserError(f"{file}: not a nanoGPT checkpoint (no model_args and model)")
    names = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "context_length": "block_size"}
    names |= {"vocab_size": "vocab_size", "bias": "bias", "dropout": "dropout"}
    if missing := [theirs for theirs in names.values() if theirs not in arguments]:
        raise UserError(f"{file}: model_args: {missing[0]} is missing")
    values = {ours: arguments[theirs] for ours, theirs in names.items()}
    config = build(ModelConfig, {**values, "activation": "gelu", "vocab_pad_multiple": 1}, where=f"{file}: model_args")
    check_model(config, f"{file}: model_args")
    tensors = {
        name.removeprefix("_orig_mod.").removeprefix("transformer."): t
        for name, t in state.items()
        if isinstance(t, Tensor) and not name.endswith(".attn.bias")
    }
    tensors.pop("lm_head.weight", None)  # tied to wte there
    weights = to_ours(NANOGPT, config, tensors, str(file))
    return Foreign(file, "nanoGPT", config, weights, *_tokenizer_from(tokenizer, file))


# ---- tokenizers -----------------------------------------------------------------------------------------------


def _tokenizer_from(spec: str | None, source: Path) -> tuple[Tokenizer | None, list[str]]:
    if spec == "none":
        return None, []
    if spec is None:
        return None, [f"{source}: no tokenizer beside it; commands that read or write text will want --tokenizer PATH"]
    path = Path(spec).expanduser()
    return (llama2c.read_tokenizer(path) if path.suffix == ".bin" else from_path(path)), []


def _tokenizer_of(folder: Path, tree: Mapping[str, Any]) -> tuple[Tokenizer | None, list[str]]:
    """What lies in a Hugging Face directory, its roles completed from the model's own config."""
    names = ("tokenizer.json", "vocab.json", "encoder.json")
    if not any((folder / name).is_file() for name in names):
        if (folder / "tokenizer.model").is_file():
            return None, [f"{folder}: tokenizer.model (SentencePiece) is not read; save it as a tokenizer.json first"]
        return _tokenizer_from(None, folder)
    tokenizer = from_path(folder)
    for role in ("eos", "bos", "pad"):
        token_id = tree.get(f"{role}_token_id")
        token = tokenizer.backend.id_to_token(token_id) if isinstance(token_id, int) else None
        if token is not None and role not in tokenizer.special:
            tokenizer = tokenizer.with_role(role, token)
    return tokenizer, []

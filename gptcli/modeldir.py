"""A model directory: model.safetensors, config.json, tokenizer.json. The one thing every command reads.

In place of model.safetensors there may be an adapter (adapter_model.safetensors, adapter_config.json), which names the
model directory that it belongs to; reading its weights gives both, merged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptcli.config.load import build, to_tree
from gptcli.config.schema import LoraBlock, ModelConfig
from gptcli.config.validate import check_model
from gptcli.errors import UserError
from gptcli.files import read_object
from gptcli.model import GPT
from gptcli.model.convert.peft import from_peft, to_peft
from gptcli.model.extend import extend_context, extend_vocab
from gptcli.model.lora import Adapter, adapter_weights, merged, new_ids
from gptcli.tokenizer import Tokenizer

FORMAT_VERSION = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class ModelDir:
    """A model directory read into memory."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer | None

    def require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError(f"{self.path}: has no tokenizer.json, so it can neither read nor write text")
        return self.tokenizer


def save_model(folder: Path, config: ModelConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer | None) -> None:
    """Write a model directory's files into `folder`, which exists. The weights are named as GPT's parameters."""
    write_tensors(folder / WEIGHTS, weights)
    _write_config(folder, config, tokenizer)


def save_adapter(folder: Path, model: GPT, lora: LoraBlock, tokenizer: Tokenizer | None, *, base: Path) -> None:
    """The same for a model that is an adapter to the one in `base`; `peft` reads these files too."""
    adapter, ids = adapter_weights(model), new_ids(model)
    tree, tensors = to_peft(model.config, lora, adapter, ids, str(base.resolve()))
    write_tensors(folder / ADAPTER, tensors)
    write_json(folder / ADAPTER_CONFIG, tree)
    _write_config(folder, model.config, tokenizer)


def _write_config(folder: Path, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    tree = {"format": "gptcli", "format_version": FORMAT_VERSION, **to_tree(config)}
    write_json(folder / CONFIG, tree)
    if tokenizer is not None:
        tokenizer.save(folder)


def read_config(folder: Path) -> ModelConfig:
    """Raises UserError naming the file for anything that is not a config of ours."""
    file = folder / CONFIG
    tree = read_json(file, missing=f"{folder}: not a checkpoint (no {CONFIG})")
    if tree.pop("format", None) != "gptcli":
        raise UserError(f"{file}: not a gptcli checkpoint; bring it in with `gpt import`")
    if (version := tree.pop("format_version", None)) != FORMAT_VERSION:
        raise UserError(f"{file}: format_version {version}, this version of gptcli reads {FORMAT_VERSION}")
    config = build(ModelConfig, tree, where=str(file))
    check_model(config, str(file))
    return config


def read_weights(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """All tensors by name, their names and shapes checked against the config; an adapter is merged into its base.
    Raises UserError."""
    if is_adapter(folder):
        file, tensors = folder / ADAPTER, _read_merged(folder, config)
    else:
        file = folder / WEIGHTS
        tensors = read_tensors(file)
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}
    if missing := sorted(expected.keys() - tensors.keys()):
        raise UserError(f"{file}: does not fit config.json: no tensor {missing[0]!r} ({len(missing)} missing)")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise UserError(f"{file}: does not fit config.json: unexpected tensor {extra[0]!r} ({len(extra)} too many)")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise UserError(f"{file}: {name} is {tuple(tensors[name].shape)}, config.json says {shape}")
    return tensors


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER).is_file()


def weight_files(folder: Path) -> list[Path]:
    """The files whose tensors make the weights; an adapter's base has its share in them."""
    return [folder / ADAPTER, *weight_files(_base_of(folder))] if is_adapter(folder) else [folder / WEIGHTS]


def _base_of(folder: Path) -> Path:
    """The model directory that the adapter in `folder` belongs to. Raises UserError."""
    file = folder / ADAPTER_CONFIG
    base = Path(str(read_json(file, missing=f"{file}: missing").get("base_model_name_or_path")))
    if not (base / CONFIG).is_file():
        raise UserError(f"{file}: base_model_name_or_path: no checkpoint at {base}; put it back, or name its new place")
    return base


def read_adapter(folder: Path, config: ModelConfig) -> Adapter:
    file = folder / ADAPTER_CONFIG
    tree = read_json(file, missing=f"{file}: missing; this checkpoint is not complete")
    return from_peft(config, tree, read_tensors(folder / ADAPTER), str(folder))


def _read_merged(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The adapter in `folder` worked into its base, which is first given the adapter's context and vocabulary."""
    base = _base_of(folder)
    base_config = read_config(base)
    weights = read_weights(base, base_config)
    base_config, weights, _ = extend_context(base_config, weights, config.context_length)
    assert config.vocab_size is not None
    _, weights = extend_vocab(base_config, weights, config.vocab_size)
    return merged(weights, read_adapter(folder, config))


def open_model_dir(folder: str | Path) -> ModelDir:
    """The config and tokenizer of a model directory; the weights are read by `load_model`."""
    folder = Path(folder)
    config = read_config(folder)
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
    if tokenizer is not None and config.vocab_size is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: tokenizer.json has {tokenizer.vocab_size} tokens, but the model only {config.vocab_size}: "
            "this tokenizer does not belong to this checkpoint"
        )
    _check_lineage(folder, tokenizer)
    return ModelDir(folder, config, tokenizer)


def load_model(folder: ModelDir, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> GPT:
    """The model in eval mode."""
    return model_of(folder.config, read_weights(folder.path, folder.config), device=device, dtype=dtype)


def model_of(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> GPT:
    """A model in eval mode from weights by name."""
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict({n: t.to(device=device, dtype=dtype) for n, t in weights.items()}, assign=True)
    return model.eval()


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(plain, file, metadata={"format": "pt"})


def read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{file}: missing; this checkpoint is not complete") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or cut short ({error})") from error


def write_json(file: Path, tree: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(tree, indent=2) + "\n", "utf-8")


def read_json(file: Path, *, missing: str) -> dict[str, Any]:
    try:
        return read_object(file)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(missing) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: damaged or cut short ({error})") from error


def _check_lineage(folder: Path, tokenizer: Tokenizer | None) -> None:
    """A training checkpoint remembers its tokenizer; a swapped one of the same size is refused."""
    file = folder / "training" / "state.json"
    if tokenizer is None or not file.is_file():
        return
    expected = read_json(file, missing="").get("tokenizer_hash")
    if expected is not None and expected != tokenizer.hash:
        raise UserError(
            f"{folder}: tokenizer.json ({tokenizer.hash}) is not the one this checkpoint was trained with ({expected})"
        )

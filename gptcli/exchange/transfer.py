"""`gpt import` and `gpt export` as functions: read, write, prove, and only then give the folder its name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcli.config.flops import count_params
from gptcli.config.schema import ModelConfig
from gptcli.errors import GptError, UserError
from gptcli.exchange import check, gguf
from gptcli.exchange.card import Lineage, model_card, read_lineage, write_lineage
from gptcli.exchange.check import Proof
from gptcli.exchange.foreign import Foreign, read_foreign
from gptcli.files import publish_folder
from gptcli.model.convert.families import Family, config_to, family_for, needs_zero_biases, with_zero_biases
from gptcli.model.convert.layouts import to_theirs
from gptcli.modeldir import (
    CONFIG,
    WEIGHTS,
    ModelDir,
    is_adapter,
    load_model,
    model_of,
    open_model_dir,
    read_weights,
    save_model,
    write_json,
    write_tensors,
)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Transfer:
    """What was done."""

    path: Path
    format: str
    params: int
    proof: Proof | None
    notes: list[str]

    def row(self) -> dict[str, Any]:
        proof = self.proof
        return {
            "path": str(self.path),
            "format": self.format,
            "params": self.params,
            "max_logit_difference": proof and proof.largest_difference,
            "tolerance": proof and proof.limit,
            "compared_with": proof and proof.against,
        }


def import_model(source: str, out: Path, *, tokenizer: str | None = None, check_logits: bool = True) -> Transfer:
    """Bring a model in as a model directory. Raises UserError for bad input, GptError if the logits differ."""
    refuse_existing(out)
    foreign = read_foreign(source, tokenizer=tokenizer)
    proof: Proof | None = None

    def fill(folder: Path) -> None:
        nonlocal proof
        save_model(folder, foreign.config, foreign.weights, foreign.tokenizer)
        write_lineage(folder, Lineage(source=source, format=foreign.format))
        if check_logits:
            proof = _prove_import(foreign, folder).require()

    publish_folder(out, fill)
    return Transfer(out, foreign.format, count_params(foreign.config), proof, foreign.notes)


def _prove_import(foreign: Foreign, folder: Path) -> Proof:
    """The written directory against transformers where it is installed and knows the source, else against the
    source's tensors as they were read."""
    ids = check.probe_ids(foreign.config, foreign.tokenizer)
    ours = check.logits_of(load_model(open_model_dir(folder)), ids)
    if foreign.hugging_face and check.has_transformers():
        return check.compare(ours, *check.transformers_logits(foreign.path, ids))
    theirs = check.logits_of(model_of(foreign.config, foreign.weights), ids)
    return check.compare(ours, theirs, "the tensors as read")


def export_hugging_face(checkpoint: Path, out: Path, *, dtype: str | None, check_logits: bool = True) -> Transfer:
    """A directory that AutoModelForCausalLM and AutoTokenizer load. Raises UserError where no architecture of
    theirs has this shape."""
    refuse_existing(out)
    source = open_model_dir(checkpoint)
    family = family_for(source.config, str(checkpoint))
    weights = _cast(read_weights(source.path, source.config), dtype)
    config, full = source.config, weights
    if needs_zero_biases(family, config):
        config, full = with_zero_biases(config, weights)
    proof: Proof | None = None

    def fill(folder: Path) -> None:
        nonlocal proof
        _write_hugging_face(folder, family, config, full, source)
        if check_logits:
            ids = check.probe_ids(config, source.tokenizer)
            ours = check.logits_of(model_of(source.config, weights), ids)
            proof = check.compare(ours, *_read_back(folder, ids)).require()

    publish_folder(out, fill)
    return Transfer(out, f"Hugging Face {family.model_type}", count_params(config), proof, [])


def _write_hugging_face(
    folder: Path, family: Family, config: ModelConfig, weights: Mapping[str, Tensor], source: ModelDir
) -> None:
    tree = config_to(family, config)
    tree["torch_dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    tokenizer = source.tokenizer
    tokens = {} if tokenizer is None else {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    ids = {f"{role}_token_id": token for role, token in tokens.items()}
    write_json(folder / CONFIG, {**tree, **ids})
    write_json(folder / "generation_config.json", {k: v for k, v in ids.items() if v is not None})
    write_tensors(folder / WEIGHTS, to_theirs(family.layout, config, weights))
    if tokenizer is not None:
        tokenizer.save(folder, context_length=config.context_length)
    (folder / "README.md").write_text(model_card(source, read_lineage(source.path), family.model_type), "utf-8")


def _read_back(folder: Path, ids: Tensor) -> tuple[Tensor, str]:
    if check.has_transformers():
        return check.transformers_logits(folder, ids)
    back = read_foreign(str(folder), tokenizer="none")
    return check.logits_of(model_of(back.config, back.weights), ids), "the directory as read back"


def export_gguf(checkpoint: Path, out: Path, *, dtype: str | None, check_logits: bool = True) -> Transfer:
    """One file for llama.cpp, read back and compared."""
    refuse_existing(out)
    source = open_model_dir(checkpoint)
    config, weights = gguf.prepare(
        source.config, _cast(read_weights(source.path, source.config), dtype), str(checkpoint)
    )
    work = out.with_name(f".{out.name}.tmp")
    work.parent.mkdir(parents=True, exist_ok=True)
    proof: Proof | None = None
    try:
        notes = gguf.write(work, config, weights, source.tokenizer, name=checkpoint.name)
        if check_logits:
            ids = check.probe_ids(config, source.tokenizer)
            ours = check.logits_of(model_of(config, weights), ids)
            theirs = check.logits_of(model_of(config, gguf.read_weights(work, config)), ids)
            proof = check.compare(ours, theirs, "the file as read back").require()
        work.replace(out)
    finally:
        with contextlib.suppress(FileNotFoundError):
            work.unlink()
    return Transfer(out, "GGUF", count_params(config), proof, notes)


def refuse_unmerged(checkpoint: Path, *, merge: bool) -> None:
    if is_adapter(checkpoint) and not merge:
        raise UserError(
            f"{checkpoint}: holds an adapter; --merge exports it worked into its base "
            "(peft reads the checkpoint as it is)"
        )


EXPORTS: dict[str, Callable[..., Transfer]] = {"hf": export_hugging_face, "gguf": export_gguf}


def refuse_existing(out: Path) -> None:
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out}: exists; choose another -o")


def _cast(weights: Mapping[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    if dtype is None:
        return dict(weights)
    cast = {name: t.to(DTYPES[dtype]) for name, t in weights.items()}
    if bad := next((name for name, t in cast.items() if not torch.isfinite(t).all()), None):
        raise GptError(f"{bad}: holds values that {dtype} cannot; export as bf16 or fp32")
    return cast

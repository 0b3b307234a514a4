"""The parts that every training stage builds the same way: model, plan, precision, run directory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from gptcli.config.gpus import has_cpp_compiler, machine_memory
from gptcli.config.load import dump_recipe
from gptcli.config.memory import USABLE, StepShape, state_bytes, weight_bytes
from gptcli.config.plan import TrainPlan, make_plan, pick_micro_batch
from gptcli.config.schema import ModelConfig, ParallelSizes, Recipe
from gptcli.dist.runtime import Runtime
from gptcli.errors import UserError
from gptcli.files import publish_text
from gptcli.model import GPT
from gptcli.model.extend import extend_context, extend_vocab
from gptcli.model.lora import add_lora, load_adapter
from gptcli.modeldir import load_model, model_of, open_model_dir, read_adapter, read_weights
from gptcli.tokenizer import Tokenizer
from gptcli.train.checkpoint import Training, find_checkpoint, load_training, remove_unfinished

R = TypeVar("R", bound=Recipe)
Weights = dict[str, torch.Tensor]
Adapt = Callable[[ModelConfig, Weights], tuple[ModelConfig, Weights]]


def resolve_model_config(recipe: Recipe, tokenizer: Tokenizer) -> ModelConfig:
    """The recipe's shape with the vocabulary filled in. Raises UserError if the tokenizer does not fit it."""
    assert recipe.model is not None
    config = recipe.model
    if config.vocab_size is None:
        return dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"model.vocab_size: {config.vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens; "
            "leave model.vocab_size out to take the tokenizer's"
        )
    return config


def start_model(
    recipe: Recipe,
    tokenizer: Tokenizer,
    data_hash: str,
    runtime: Runtime,
    say: Callable[[str], None],
    *,
    resume: Path | None,
    build: Callable[[], GPT] | None = None,
) -> tuple[GPT, Training | None]:
    """The model to train, and where the run `resume` stands if one is resumed: then the model is its latest. `build`
    makes the model to begin with, where that is not build_model's."""
    build = build or partial(build_model, recipe, tokenizer, runtime, say)
    if resume is None:
        return build(), None
    checkpoint = find_checkpoint(resume)
    training = load_training(checkpoint)
    if training.facts["tokenizer_hash"] != tokenizer.hash:
        raise UserError(f"{checkpoint}: was trained with another tokenizer than the data has now; cannot resume")
    if training.facts["data_hash"] != data_hash:
        raise UserError(
            f"{checkpoint}: the data has changed since this checkpoint, so a resume would not be exact; "
            f"start a new run from its weights with -s init_from={checkpoint}"
        )
    if recipe.lora is None:
        return load_model(open_model_dir(checkpoint), device=runtime.device).train(), training
    model = build()
    load_adapter(model, read_adapter(checkpoint, model.config)[0])
    return model, training


def pinned(recipe: R) -> R:
    """The recipe with the checkpoint that init_from means now, so that a resume finds the same base."""
    if recipe.init_from is None:
        return recipe
    return dataclasses.replace(recipe, init_from=str(find_checkpoint(recipe.init_from)))


def build_model(
    recipe: Recipe, tokenizer: Tokenizer, runtime: Runtime, say: Callable[[str], None], adapt: Adapt | None = None
) -> GPT:
    """A fresh model from the recipe's seed, or one that starts from other weights (init_from)."""
    if recipe.init_from is not None:
        return _model_from(recipe, recipe.init_from, tokenizer, runtime, say, adapt)
    config = resolve_model_config(recipe, tokenizer)
    refuse_what_cannot_fit(config, recipe, runtime)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=runtime.device)
    model.init_weights(recipe.run.seed)
    return model


def _model_from(
    recipe: Recipe,
    init_from: str,
    tokenizer: Tokenizer,
    runtime: Runtime,
    say: Callable[[str], None],
    adapt: Adapt | None,
) -> GPT:
    """Another checkpoint's weights, its context stretched if the recipe asks for that, its vocabulary grown to the
    tokenizer's; with lora, frozen beside what is trained."""
    folder = open_model_dir(find_checkpoint(init_from))
    config, weights = folder.config, read_weights(folder.path, folder.config)
    if recipe.context_length is not None:
        config, weights, how = extend_context(config, weights, recipe.context_length)
        say(f"{init_from}: context of {config.context_length} tokens: {how}")
    if (recipe.train.seq_len or 0) > config.context_length:
        raise UserError(
            f"train.seq_len: {recipe.train.seq_len} is more than the {config.context_length} tokens of context of "
            f"{init_from}; -s context_length={recipe.train.seq_len} stretches it"
        )
    assert config.vocab_size is not None
    known = config.vocab_size if folder.tokenizer is None else folder.tokenizer.vocab_size
    if tokenizer.vocab_size > known:
        larger = max(tokenizer.vocab_size, config.vocab_size)
        config, weights = extend_vocab(dataclasses.replace(config, vocab_size=known), weights, larger)
        say(f"{init_from}: {tokenizer.vocab_size - known} new tokens; their embeddings begin as the mean of all")
    if adapt is not None:
        config, weights = adapt(config, weights)
    refuse_what_cannot_fit(config, recipe, runtime)
    model = model_of(config, weights, device=runtime.device).train()
    if recipe.lora is not None:
        new_tokens = range(known, model.vocab_size) if tokenizer.vocab_size > known else range(0)
        add_lora(model, recipe.lora, recipe.run.seed, new_tokens=new_tokens)
    return model


def refuse_what_cannot_fit(config: ModelConfig, recipe: Recipe, runtime: Runtime) -> None:
    """Raises UserError before a model is built whose training state alone exceeds the memory; of a frozen base, its
    weights alone."""
    frozen = recipe.lora is not None
    need = weight_bytes(config, ParallelSizes()) if frozen else state_bytes(config, recipe.optim.name)
    have = total_memory(runtime)
    if have is not None and need > have:
        raise UserError(
            f"model: training it takes {need / 2**30:,.0f} GiB for weights, gradients and optimizer state, and this "
            f"{'GPU' if runtime.device.type == 'cuda' else 'machine'} has {have / 2**30:,.0f} GiB; "
            "`gpt plan` gives its needs, a smaller recipe (`gpt recipes`) runs here"
        )


def total_memory(runtime: Runtime) -> int | None:
    """Bytes of the GPU's memory, or of this process's share of the machine's."""
    if runtime.device.type == "cuda":
        return torch.cuda.get_device_properties(runtime.device).total_memory
    machine = machine_memory()
    return None if machine is None else machine // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def pick_plan(
    recipe: Recipe,
    config: ModelConfig,
    runtime: Runtime,
    say: Callable[[str], None],
    *,
    dtype: torch.dtype,
    examples: int | None = None,
    example_tokens: int | None = None,
    texts_per_row: int = 1,
) -> TrainPlan:
    """The computed plan, micro_batch_size chosen by the memory there is if it is auto.

    Where rows are examples: how many an epoch has, the tokens of the longest, and how many texts are read for a row."""
    on_cpu = runtime.device.type == "cpu"
    step = StepShape(
        rows=1,
        seq_len=texts_per_row * (example_tokens or recipe.train.seq_len or config.context_length),
        half=dtype != torch.float32,
        on_cpu=on_cpu,
        optimizer=recipe.optim.name,
        layout=ParallelSizes(dp=runtime.dp_size),
    )
    have = total_memory(runtime)
    room = float("inf") if have is None else USABLE * have
    plan = make_plan(
        recipe,
        context_length=config.context_length,
        dp_size=runtime.dp_size,
        micro_batch_size=pick_micro_batch(recipe, config, step, replicas=runtime.dp_size, room=room),
        on_cpu=on_cpu,
        examples=examples,
    )
    if on_cpu and plan.global_batch_size != recipe.train.global_batch_size:
        say(
            f"no GPU here: steps of {plan.global_batch_size} rows (train.global_batch_size_cpu) "
            f"instead of {recipe.train.global_batch_size}"
        )
    return plan


def open_run_dir(recipe: Recipe, runtime: Runtime, *, resume: bool) -> Path:
    """Create RUN and write the resolved recipe into it; an existing run is refused unless it is resumed."""
    assert recipe.run.name is not None
    folder = Path(recipe.run.dir) / recipe.run.name
    if runtime.is_main:
        if folder.exists() and not resume and any(p for p in folder.iterdir() if p.name[:1] != "."):
            raise UserError(
                f"{folder}: this run exists; go on with --resume {folder}, or choose another -s run.name=NAME"
            )
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        publish_text(folder / "recipe.yaml", dump_recipe(recipe))
    runtime.barrier()
    return folder


def compile_model(model: GPT, recipe: Recipe, say: Callable[[str], None]) -> None:
    """torch.compile in place, so that parameter names stay; without a C++ compiler, say so once and run eager."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    if not recipe.train.compile or (recipe.train.compile == "auto" and on_cpu):
        return
    if on_cpu and not has_cpp_compiler():
        say("train.compile: no C++ compiler on this machine, so the model runs uncompiled")
        return
    model.compile(dynamic=False)

"""What follows from a recipe and the machine: the model to train, and the plan of its steps."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import torch

from gptcli.config.gpus import machine_memory
from gptcli.config.memory import USABLE, StepShape, state_bytes, weight_bytes
from gptcli.config.plan import TrainPlan, make_plan, pick_micro_batch
from gptcli.config.schema import ModelConfig, ParallelSizes, Recipe
from gptcli.dist.runtime import Runtime
from gptcli.errors import UserError
from gptcli.model import GPT
from gptcli.model.extend import extend_context, extend_vocab
from gptcli.model.lora import add_lora
from gptcli.modeldir import model_of, open_model_dir, read_weights
from gptcli.tokenizer import Tokenizer
from gptcli.train.checkpoint import find_checkpoint

Weights = dict[str, torch.Tensor]


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


def build_model(recipe: Recipe, tokenizer: Tokenizer, runtime: Runtime, say: Callable[[str], None]) -> GPT:
    """The model that the recipe begins with."""
    return trainable(recipe, runtime, *first_weights(recipe, tokenizer, runtime, say))


def first_weights(
    recipe: Recipe, tokenizer: Tokenizer, runtime: Runtime, say: Callable[[str], None]
) -> tuple[ModelConfig, Weights, range]:
    """Shape and weights: fresh from the recipe's seed, or another checkpoint's (init_from), its context stretched if
    the recipe asks for that, its vocabulary grown to the tokenizer's. The range: the ids of new rows in it.

    Raises UserError before anything is made whose training does not fit the memory."""
    if recipe.init_from is not None:
        return _weights_of(recipe, recipe.init_from, tokenizer, runtime, say)
    config = resolve_model_config(recipe, tokenizer)
    refuse_what_cannot_fit(config, recipe, runtime)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=runtime.device)
    model.init_weights(recipe.run.seed)
    return config, model.state_dict(), range(0)


def _weights_of(
    recipe: Recipe, init_from: str, tokenizer: Tokenizer, runtime: Runtime, say: Callable[[str], None]
) -> tuple[ModelConfig, Weights, range]:
    folder = open_model_dir(find_checkpoint(init_from))
    refuse_what_cannot_fit(folder.config, recipe, runtime)
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
    if tokenizer.vocab_size <= known:
        return config, weights, range(0)
    larger = max(tokenizer.vocab_size, config.vocab_size)
    config, weights = extend_vocab(dataclasses.replace(config, vocab_size=known), weights, larger)
    say(f"{init_from}: {tokenizer.vocab_size - known} new tokens; their embeddings begin as the mean of all")
    return config, weights, range(known, larger)


def trainable(
    recipe: Recipe, runtime: Runtime, config: ModelConfig, weights: Weights, new_tokens: range = range(0)
) -> GPT:
    """A model of these weights; with lora, frozen beside what is trained, rows of new tokens among it."""
    model = model_of(config, weights, device=runtime.device).train()
    if recipe.lora is not None:
        add_lora(model, recipe.lora, recipe.run.seed, new_tokens=new_tokens)
        if not any(p.requires_grad for p in model.parameters()):
            raise UserError("lora.targets: is empty, and there is no new head or token: nothing would be trained")
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

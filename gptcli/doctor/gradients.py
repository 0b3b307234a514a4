"""The gradient that a real training step ends with, in one process or as the sum of two."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gptcli.config.plan import TrainPlan, make_plan
from gptcli.config.schema import OptimBlock, PretrainRecipe, TrainBlock
from gptcli.contracts import Batch
from gptcli.dist.runtime import Runtime, runtime
from gptcli.dist.wrap import parallelize
from gptcli.doctor.subject import split_batch, uneven_batch
from gptcli.model import GPT
from gptcli.modeldir import load_model, open_model_dir
from gptcli.train.loop import train_step
from gptcli.train.objectives import next_token
from gptcli.train.optim import Optimizers
from gptcli.train.stop import StopSignal

PROCESSES = 2


class KeepGradient(torch.optim.Optimizer):
    """An optimizer that keeps the gradient instead of following it."""

    def __init__(self, model: nn.Module) -> None:
        self.named = dict(model.named_parameters())
        super().__init__(self.named.values(), {"lr": 0.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.kept = {name: p.grad.detach().cpu().clone() for name, p in self.named.items() if p.grad is not None}


def recipe_of(rows: int, steps: int = 1, **optim: Any) -> PretrainRecipe:
    return PretrainRecipe(
        optim=OptimBlock(schedule="constant", weight_decay=0.0, **optim),
        train=TrainBlock(max_steps=steps, global_batch_size=rows),
    )


def plan_of(recipe: PretrainRecipe, length: int, processes: int = 1) -> TrainPlan:
    return make_plan(recipe, context_length=length, dp_size=processes, micro_batch_size=1)


def gradient(model: GPT, micro_batches: Sequence[Batch], here: Runtime) -> dict[str, Tensor]:
    """By parameter name, of this process's micro-batches and those of all others."""
    keeper = KeepGradient(model)
    recipe = recipe_of(rows=PROCESSES, grad_clip=0.0)
    train_step(
        parallelize(model, recipe, here),
        Optimizers(keeper.named, [keeper]),
        micro_batches,
        next_token,
        0,
        plan_of(recipe, model.config.context_length, here.dp_size),
        here,
        StopSignal(),
        1.0,
        seed=0,
        dtype=torch.float32,
    )
    return keeper.kept


def gradient_of_two(folder: Path, rows: int, length: int, worker: Callable[..., None]) -> dict[str, Tensor]:
    """The gradient of uneven_batch(rows), half of whose rows each of two processes on this machine's CPU takes."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "gradient.safetensors"
        arguments = (str(folder), rows, length, _free_port(), str(file))
        torch.multiprocessing.start_processes(worker, arguments, PROCESSES, start_method="spawn")
        return load_file(file)


def take_half(rank: int, folder: str, rows: int, length: int, port: int, file: str) -> None:
    """One of the two processes; the first writes what both arrived at."""
    shared = {"WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()})
    with runtime("cpu") as here:
        model = load_model(open_model_dir(folder))
        mine = split_batch(uneven_batch(model.vocab_size, rows, length), [rows // PROCESSES] * PROCESSES)[rank]
        found = gradient(model, [mine], here)
        if here.is_main:
            save_file(found, file)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

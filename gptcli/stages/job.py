"""What every stage begins and ends with: a recipe to carry out, a model to start from, the run around the one loop."""

from __future__ import annotations

import dataclasses
import importlib
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gptcli.config.gpus import has_cpp_compiler
from gptcli.config.load import dump_recipe
from gptcli.config.plan import TrainPlan
from gptcli.config.schema import Recipe
from gptcli.contracts import Batch, BatchSource, LossSum, Objective
from gptcli.dist.runtime import Runtime, pick_precision
from gptcli.dist.wrap import check_layout
from gptcli.errors import UserError
from gptcli.files import open_locked, publish_text
from gptcli.model import GPT
from gptcli.model.lora import load_adapter
from gptcli.modeldir import ModelDir, load_model, open_model_dir, read_adapter
from gptcli.stages.build import build_model, pick_plan
from gptcli.stages.console import RunConsole
from gptcli.stages.run import TrainingRun
from gptcli.tokenizer import Tokenizer
from gptcli.train.checkpoint import Training, checkpoints, find_checkpoint, load_training, remove_unfinished
from gptcli.train.optim import make_optimizer

R = TypeVar("R", bound=Recipe)
MASKS = {"attention_mask", "document_ids"}


def run_stage(
    recipe: Recipe, runtime: Runtime, console: RunConsole, *, resume: Path | None = None, dry_run: bool = False
) -> dict[str, Any]:
    """Train as the recipe says and return the summary. `resume` is a run directory whose latest checkpoint to go on
    from. A stage is the module of its name: `run(job)` builds its source and objective, and calls `Started.train`."""
    check_layout(recipe.parallel, runtime.world_size)
    stage = importlib.import_module("gptcli.stages." + recipe.stage.removeprefix("rlhf-"))
    with tempfile.TemporaryDirectory(prefix="gpt-dry-run-") if dry_run else nullcontext() as scratch:
        job = Job(_pinned(recipe), runtime, console, resume, scratch=Path(scratch) if scratch else None)
        with job.held:
            summary: dict[str, Any] = stage.run(job)
        return summary


def _pinned(recipe: R) -> R:
    """The recipe with the checkpoint that init_from means now, so that a resume finds the same base."""
    if recipe.init_from is None:
        return recipe
    return dataclasses.replace(recipe, init_from=str(find_checkpoint(recipe.init_from)))


@dataclass(frozen=True)
class Job(Generic[R]):
    """A recipe and where it is carried out. `scratch`: a dry run's folder, gone afterwards. `held`: what is let
    go at the end, the run's lock."""

    recipe: R
    runtime: Runtime
    console: RunConsole
    resume: Path | None = None
    scratch: Path | None = None
    held: ExitStack = field(default_factory=ExitStack)

    @property
    def say(self) -> Callable[[str], None]:
        return self.console.say

    @cached_property
    def dtype(self) -> torch.dtype:
        return pick_precision(self.recipe.train.precision, self.runtime.device)

    @cached_property
    def base(self) -> ModelDir:
        """The checkpoint of init_from."""
        assert self.recipe.init_from is not None
        return open_model_dir(find_checkpoint(self.recipe.init_from))

    @cached_property
    def run_dir(self) -> Path:
        """RUN with the resolved recipe in it, made when it is first asked for, so that what is wrong with a recipe or
        its data leaves none behind. Raises UserError for a run that exists and is not resumed."""
        if self.scratch is not None:
            return self.scratch
        recipe = self.recipe
        assert recipe.run.name is not None
        folder = Path(recipe.run.dir) / recipe.run.name
        if self.runtime.is_main:
            there = folder.exists() and any(p for p in folder.iterdir() if p.name[:1] != ".")
            if there and not (folder / "recipe.yaml").is_file():
                raise UserError(f"{folder}: holds something else than a run; choose another -s run.name=NAME")
            folder.mkdir(parents=True, exist_ok=True)
            self.held.enter_context(open_locked(folder / ".lock"))
            if self.resume is None and there and checkpoints(folder):
                way = f"go on with --resume {folder}"
                raise UserError(f"{folder}: this run exists; {way}, or choose another -s run.name=NAME")
            remove_unfinished(folder)  # a run that ended before its first save has nothing to lose
            publish_text(folder / "recipe.yaml", dump_recipe(recipe))
        self.runtime.barrier()
        return folder

    @cached_property
    def compiles(self) -> bool:
        """Whether train.compile asks for it here; without a C++ compiler, says so once and runs uncompiled."""
        wanted, on_cpu = self.recipe.train.compile, self.runtime.device.type == "cpu"
        if not wanted or (wanted == "auto" and on_cpu):
            return False
        if on_cpu and not has_cpp_compiler():
            self.say("train.compile: no C++ compiler on this machine, so the model runs uncompiled")
            return False
        return True

    def start(self, tokenizer: Tokenizer, data_hash: str, build: Callable[[], GPT] | None = None) -> Started:
        """The job with the model to begin with (`build`'s, or build_model's), or with the latest of the run that is
        resumed. Raises UserError where tokenizer or data are not those that the run began with."""
        build = build or partial(build_model, self.recipe, tokenizer, self.runtime, self.say)
        if self.resume is None:
            return Started(self, tokenizer, data_hash, build())
        checkpoint = find_checkpoint(self.resume)
        training = load_training(checkpoint)
        if training.facts["tokenizer_hash"] != tokenizer.hash:
            raise UserError(f"{checkpoint}: was trained with another tokenizer than the data has now; cannot resume")
        if training.facts["data_hash"] != data_hash:
            what = "data, the base or what gives rewards" if self.recipe.stage.startswith("rlhf-") else "data"
            raise UserError(
                f"{checkpoint}: the {what} has changed since this checkpoint, so a resume would not be exact; "
                f"start a new run from its weights with -s init_from={checkpoint}"
            )
        if self.recipe.lora is None:
            model = load_model(open_model_dir(checkpoint), device=self.runtime.device).train()
        else:
            model = build()
            load_adapter(model, read_adapter(checkpoint, model.config).weights)
        return Started(self, tokenizer, data_hash, model, training)


@dataclass(frozen=True)
class Started:
    """A job with its model; `resumed`: where the run stands that is resumed."""

    job: Job[Any]
    tokenizer: Tokenizer
    data_hash: str
    model: GPT
    resumed: Training | None = None

    def plan(self, **sizes: int) -> TrainPlan:
        """The computed plan; `sizes` as pick_plan has them."""
        job = self.job
        return pick_plan(job.recipe, self.model.config, job.runtime, job.say, dtype=job.dtype, **sizes)

    def train(
        self,
        plan: TrainPlan,
        source: BatchSource,
        objective: Objective,
        held_out: Sequence[Batch] = (),
        *,
        widths_stay: bool = True,
        **around: Any,
    ) -> dict[str, Any]:
        """Train and return the summary. widths_stay: rows are as wide in each step, so that a model can be compiled.
        `around`: what else the run does, as TrainingRun has it."""
        job = self.job
        if widths_stay and job.compiles:
            self.model.compile(dynamic=False)  # in place, so that parameter names stay
            objective = _by_cudnn(objective, job.runtime.device)
        training = TrainingRun(
            recipe=job.recipe,
            runtime=job.runtime,
            console=job.console,
            run_dir=job.run_dir,
            model=self.model,
            tokenizer=self.tokenizer,
            optimizer=make_optimizer(self.model, job.recipe.optim, self.model.hidden_matrices()),
            plan=plan,
            dtype=job.dtype,
            source=source,
            objective=objective,
            held_out=held_out,
            data_hash=self.data_hash,
            resumed=self.resumed,
            **around,
        )
        return training.execute()


def _by_cudnn(objective: Objective, device: torch.device) -> Objective:
    """On a Hopper GPU the objective with cuDNN's attention, by which a step of 124M takes 0.94 of the time; it prepares
    for each shape, so only where shapes stay, and masked rows keep the other kernels."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return objective
    flash = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    def asked(model: nn.Module, batch: Batch) -> LossSum:
        if MASKS & batch.tensors.keys():
            return objective(model, batch)
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *flash], set_priority=True):
            return objective(model, batch)

    return asked

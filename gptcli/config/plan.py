"""What follows from a recipe and a number of processes: the computed, checked plan of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from gptcli.config.memory import StepShape, largest_micro_batch
from gptcli.config.schema import BatchRamp, ModelConfig, OptimBlock, Recipe
from gptcli.errors import UserError


@dataclass(frozen=True)
class TrainPlan:
    """Sizes in rows of `seq_len` tokens. `dp_size` is the number of data-parallel replicas."""

    max_steps: int | None
    max_tokens: int | None
    seq_len: int
    global_batch_size: int
    micro_batch_size: int
    dp_size: int
    batch_ramp: BatchRamp | None
    optim: OptimBlock
    epoch_steps: int | None = None  # steps of one pass, where the recipe counts epochs

    def rows_at(self, tokens_seen: int) -> int:
        """Rows of the optimizer step that follows after `tokens_seen`, over all replicas."""
        ramp = self.batch_ramp
        if ramp is None or tokens_seen >= ramp.tokens:
            return self.global_batch_size
        grown = ramp.start + (self.global_batch_size - ramp.start) * tokens_seen / ramp.tokens
        return max(ramp.start, int(grown) // ramp.start * ramp.start)

    @property
    def grad_accum_steps(self) -> int:
        """Micro-batches per replica of a full-sized step."""
        return -(-self.global_batch_size // (self.dp_size * self.micro_batch_size))

    def is_done(self, step: int, tokens_seen: int) -> bool:
        if self.max_steps is not None:
            return step >= self.max_steps
        assert self.max_tokens is not None
        return tokens_seen >= self.max_tokens

    def progress(self, step: int, tokens_seen: int) -> float:
        """The share of the run that is behind us, in [0, 1]."""
        if self.max_steps is not None:
            return min(1.0, step / self.max_steps)
        assert self.max_tokens is not None
        return min(1.0, tokens_seen / self.max_tokens)


def global_batch_size(recipe: Recipe, *, on_cpu: bool) -> int:
    train = recipe.train
    if on_cpu and train.global_batch_size_cpu is not None:
        return train.global_batch_size_cpu
    return train.global_batch_size


def replica_rows(recipe: Recipe, *, replicas: int, on_cpu: bool) -> tuple[int, int]:
    """A replica's rows of a full step, and of the smallest, which the batch's ramp begins with."""
    rows, train = global_batch_size(recipe, on_cpu=on_cpu), recipe.train
    full = -(-rows // replicas)
    ramp = train.batch_ramp if rows == train.global_batch_size else None
    return full, full if ramp is None else max(1, ramp.start // replicas)


def pick_micro_batch(recipe: Recipe, model: ModelConfig, step: StepShape, *, replicas: int, room: float) -> int:
    """The recipe's rows of a micro-batch; for auto the most whose step fits `room` bytes, or one where none does."""
    full, smallest = replica_rows(recipe, replicas=replicas, on_cpu=step.on_cpu)
    wanted = recipe.train.micro_batch_size
    if wanted != "auto":
        return min(wanted, full)
    return largest_micro_batch(model, step, per_process=full, smallest=smallest, room=room) or 1


def texts_per_row(recipe: Recipe) -> int:
    """Those of a comparison are two at least; of rankings the data has more."""
    return 2 if recipe.stage in ("rlhf-reward", "rlhf-dpo") else 1


def training_tokens(recipe: Recipe, seq_len: int) -> int:
    """How many the whole run reads."""
    train = recipe.train
    if train.max_tokens is not None:
        return train.max_tokens
    if train.max_steps is None:
        raise UserError("train.epochs: how long that is depends on the examples; -s train.max_steps=N plans without")
    return train.max_steps * train.global_batch_size * texts_per_row(recipe) * seq_len


def make_plan(
    recipe: Recipe,
    *,
    context_length: int,
    dp_size: int,
    micro_batch_size: int,
    on_cpu: bool = False,
    examples: int | None = None,
) -> TrainPlan:
    """`examples`: those of one epoch. Raises UserError where batch and processes do not divide."""
    train = recipe.train
    rows = global_batch_size(recipe, on_cpu=on_cpu)
    ramp = train.batch_ramp if rows == train.global_batch_size else None
    if rows % dp_size:
        raise UserError(f"train.global_batch_size: {rows} rows cannot be shared by {dp_size} processes")
    if ramp is not None and ramp.start % dp_size:
        raise UserError(f"train.batch_ramp.start: {ramp.start} rows cannot be shared by {dp_size} processes")
    if (rows // dp_size) % micro_batch_size:
        raise UserError(
            f"train.micro_batch_size: {micro_batch_size} does not divide the {rows // dp_size} rows "
            f"of a process (global_batch_size {rows} / {dp_size} processes)"
        )
    max_steps, epoch_steps, optim = train.max_steps, None, recipe.optim
    if train.epochs is not None:
        assert examples is not None
        max_steps, epoch_steps = math.ceil(train.epochs * examples / rows), math.ceil(examples / rows)
    if optim.warmup_ratio is not None and max_steps is not None:
        optim = replace(optim, warmup_steps=round(optim.warmup_ratio * max_steps))
    elif optim.warmup_ratio is not None and train.max_tokens is not None:
        optim = replace(optim, warmup_tokens=round(optim.warmup_ratio * train.max_tokens))
    return TrainPlan(
        max_steps=max_steps,
        max_tokens=train.max_tokens,
        seq_len=train.seq_len or context_length,
        global_batch_size=rows,
        micro_batch_size=micro_batch_size,
        dp_size=dp_size,
        batch_ramp=ramp,
        optim=optim,
        epoch_steps=epoch_steps,
    )

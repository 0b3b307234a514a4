"""The one training loop. A stage brings a source of batches and an objective; nothing here knows which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gptcli.config.plan import TrainPlan
from gptcli.contracts import Batch, BatchSource, LossSum, Objective
from gptcli.dist.runtime import Runtime, autocast
from gptcli.dist.wrap import no_grad_sync
from gptcli.errors import Stopped
from gptcli.randomness import derive
from gptcli.train.optim import Optimizers
from gptcli.train.schedule import lr_factor
from gptcli.train.state import TrainState
from gptcli.train.stop import StopSignal


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. Tensors stay on the device: reading them is for those who log."""

    step: int
    loss_sum: Tensor  # this rank's
    metric_sums: dict[str, Tensor]  # this rank's
    weight: float  # of all ranks
    tokens: int  # of all ranks
    lr: float
    grad_norm: Tensor


@dataclass(frozen=True)
class Every:
    """Call `fn` after every n-th step (0: never), and after the last one too if `at_end`."""

    n: int
    fn: Callable[[StepResult], None]
    at_end: bool = field(default=False)

    def due(self, step: int, last: bool) -> bool:
        return (self.at_end and last) or (self.n > 0 and step % self.n == 0)


def train(
    model: nn.Module,
    optimizer: Optimizers,
    source: BatchSource,
    objective: Objective,
    state: TrainState,
    plan: TrainPlan,
    runtime: Runtime,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    every: Sequence[Every] = (),
) -> None:
    """Step until the plan is done or an entry sets `state.stopped`. `model` is what is called: a GPT or its wrapper.

    Raises Stopped after a signal, when the step in flight is done and every entry with `at_end` has run.
    """
    model.train()
    with StopSignal() as stop:
        while not (state.stopped or plan.is_done(state.step, state.tokens_seen)):
            batches = source.next_step()
            factor = lr_factor(plan, state.step, state.tokens_seen)
            optimizer.set_lr(factor)
            result, signum = train_step(
                model,
                optimizer,
                batches,
                objective,
                state.step,
                plan,
                runtime,
                stop,
                factor,
                seed=seed,
                dtype=dtype,
            )
            state.step += 1
            state.tokens_seen += result.tokens
            last = bool(signum) or plan.is_done(state.step, state.tokens_seen)
            for entry in every:
                if entry.due(state.step, last or state.stopped):
                    entry.fn(result)
            if signum:
                raise Stopped(signum, f"stopped after step {state.step}, which is saved")


def train_step(
    model: nn.Module,
    optimizer: Optimizers,
    batches: Sequence[Batch],
    objective: Objective,
    step: int,
    plan: TrainPlan,
    runtime: Runtime,
    stop: StopSignal,
    factor: float,
    *,
    seed: int,
    dtype: torch.dtype,
) -> tuple[StepResult, int]:
    """One optimizer step over this rank's micro-batches; also returns the signal any rank has received, or 0.

    The gradient is that of (sum of losses) / (sum of weights) over all micro-batches of all ranks, however they
    are split: the data-parallel mean of `loss_sum * dp_size / weight`.
    """
    mine = [sum(b.weight for b in batches), sum(b.tokens for b in batches)]
    weight, tokens, *signals = runtime.host_sum([*mine, stop.signum == 2, stop.signum == 15])
    scale = runtime.dp_size / max(weight, 1.0)
    losses: list[LossSum] = []
    for micro_step, batch in enumerate(batches):
        torch.manual_seed(derive(seed, "dropout", step, micro_step, runtime.dp_rank))
        with no_grad_sync(model, skip=micro_step < len(batches) - 1):
            with autocast(runtime.device, dtype):
                out = objective(model, batch.to(runtime.device))
            (out.loss * scale).backward()
        losses.append(LossSum(out.loss.detach(), {k: v.detach() for k, v in out.metrics.items()}))
    limit = plan.optim.grad_clip or float("inf")
    grad_norm = nn.utils.clip_grad_norm_(optimizer.parameters(), limit)
    optimizer.step()
    optimizer.zero_grad()
    result = StepResult(
        step=step + 1,
        loss_sum=torch.stack([x.loss for x in losses]).sum(),
        metric_sums={k: torch.stack([x.metrics[k] for x in losses]).sum() for k in losses[0].metrics},
        weight=weight,
        tokens=int(tokens),
        lr=plan.optim.lr * factor,
        grad_norm=grad_norm,
    )
    return result, (2 if signals[0] else 15 if signals[1] else 0)


def evaluate(
    model: nn.Module, batches: Sequence[Batch], objective: Objective, runtime: Runtime, *, dtype: torch.dtype
) -> float:
    """The objective's mean over held-out batches of all ranks; `model` is the bare model, so ranks only meet here."""
    return evaluate_all(model, batches, objective, runtime, dtype=dtype)["loss"]


@torch.no_grad()
def evaluate_all(
    model: nn.Module, batches: Sequence[Batch], objective: Objective, runtime: Runtime, *, dtype: torch.dtype
) -> dict[str, float]:
    """The same, and the means of the objective's metrics. Every rank has at least one batch, or none has."""
    was_training = model.training
    model.eval()
    sums: dict[str, float] = {"weight": 0.0, "loss": 0.0}
    for batch in batches:
        with autocast(runtime.device, dtype):
            out = objective(model, batch.to(runtime.device))
        sums["weight"] += batch.weight
        for name, value in {"loss": out.loss, **out.metrics}.items():
            sums[name] = sums.get(name, 0.0) + value.double().item()
    model.train(was_training)
    weight, *totals = runtime.host_sum(list(sums.values()))
    return {name: total / max(weight, 1.0) for name, total in zip(list(sums)[1:], totals, strict=True)}

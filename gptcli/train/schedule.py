"""Learning-rate schedules: pure functions of where the training stands."""

from __future__ import annotations

import math

from gptcli.config.plan import TrainPlan


def lr_factor(plan: TrainPlan, step: int, tokens_seen: int) -> float:
    """The share of the peak learning rate for the optimizer step number `step` (from 0).

    Warmup is linear and its first step is not 0. After it: cosine (GPT-3: to 10%, then constant) or linear from
    the warmup's end to the decay's end; wsd: constant, then linear over the last decay_steps. Counted in tokens
    where the recipe gives tokens; a warmup in the other unit ends where batches of the full size end it.
    """
    optim = plan.optim
    warmup = _warmup(plan, step, tokens_seen)
    if warmup < 1.0:
        return warmup
    if optim.schedule == "constant":
        return 1.0
    step_tokens = plan.global_batch_size * plan.seq_len
    if optim.decay_tokens is not None or (optim.decay_steps is None and plan.max_steps is None):
        here, total, decay = float(tokens_seen), plan.max_tokens, optim.decay_tokens
        start = float(optim.warmup_tokens or optim.warmup_steps * step_tokens)
    else:
        here, total, decay = float(step), plan.max_steps, optim.decay_steps
        start = optim.warmup_steps or (optim.warmup_tokens or 0) / step_tokens
    end = float(decay or total or 1)
    if optim.schedule == "wsd":
        assert total is not None, "validate() asks for a decay in the unit of the run's length"
        start, end = total - end, float(total)
    x = min(1.0, max(0.0, (here - start) / max(end - start, 1e-9)))
    shape = 0.5 * (1 + math.cos(math.pi * x)) if optim.schedule == "cosine" else 1 - x
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * shape


def _warmup(plan: TrainPlan, step: int, tokens_seen: int) -> float:
    optim = plan.optim
    if optim.warmup_tokens:
        step_tokens = plan.rows_at(tokens_seen) * plan.seq_len
        return min(1.0, (tokens_seen + step_tokens) / optim.warmup_tokens)
    if optim.warmup_steps:
        return min(1.0, (step + 1) / optim.warmup_steps)
    return 1.0

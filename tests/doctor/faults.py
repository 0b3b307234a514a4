"""Faults, one for each promise: what a slip of the pen in the package would be, put there by monkeypatching."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptcli import modeldir
from gptcli.dist.runtime import Runtime
from gptcli.doctor import gradients
from gptcli.exchange import transfer
from gptcli.generate import native
from gptcli.model import gpt
from gptcli.train.optim import Optimizers

Patch = pytest.MonkeyPatch
FAULTS: dict[str, Callable[[Patch], None]] = {}


def fault_in(check: str) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    def register(fault: Callable[[Patch], None]) -> Callable[[Patch], None]:
        FAULTS[check] = fault
        return fault

    return register


def wrap(patch: Patch, owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace owner.name by `around(what it was, *arguments)`."""
    right = getattr(owner, name)
    patch.setattr(owner, name, lambda *a, **k: around(right, *a, **k))


@fault_in("native")
def native_divides_scores_by_another_root(patch: Patch) -> None:
    def described(right: Any, *given: Any) -> Any:
        found = right(*given)
        found.attention_scale /= 2
        return found

    wrap(patch, native, "_model", described)


@fault_in("cached")
def cached_positions_are_off_by_one(patch: Patch) -> None:
    def positions(right: Any, tokens: Tensor, mask: Any, documents: Any, step: Any) -> Tensor:
        found = right(tokens, mask, documents, step)
        return found if step is None or step.start == 0 else found - 1

    wrap(patch, gpt, "default_positions", positions)


@fault_in("packed")
def documents_see_those_before_them(patch: Patch) -> None:
    def visibility(right: Any, config: Any, tokens: Tensor, mask: Any, documents: Any, step: Any) -> Any:
        return right(config, tokens, mask, None, step)

    wrap(patch, gpt, "visibility", visibility)


@fault_in("batched")
def padding_counts_as_positions(patch: Patch) -> None:
    def positions(right: Any, tokens: Tensor, mask: Any, documents: Any, step: Any) -> Tensor:
        return right(tokens, None, documents, step)

    wrap(patch, gpt, "default_positions", positions)


@fault_in("accumulated")
def the_loss_is_a_mean_over_the_micro_batch(patch: Patch) -> None:
    def forward(right: Any, model: Any, tokens: Tensor, *, targets: Any = None, **rest: Any) -> Any:
        out = right(model, tokens, targets=targets, **rest)
        return out if targets is None else out._replace(logprobs=out.logprobs / (targets >= 0).sum())

    wrap(patch, gpt.GPT, "forward", forward)


def half_that_divides_by_its_own_weight(*arguments: Any) -> None:
    with Patch.context() as patch:
        patch.setattr(Runtime, "host_sum", lambda here, values: values)
        gradients.take_half(*arguments)


@fault_in("two processes")
def each_process_divides_by_its_own_weight(patch: Patch) -> None:
    patch.setattr(gradients, "take_half", half_that_divides_by_its_own_weight)


@fault_in("exported")
def a_square_matrix_is_exported_transposed(patch: Patch) -> None:
    def to_theirs(right: Any, *arguments: Any) -> dict[str, Tensor]:
        return {n: t.T if n.endswith("attn.c_proj.weight") else t for n, t in right(*arguments).items()}

    wrap(patch, transfer, "to_theirs", to_theirs)


@fault_in("bf16")
def a_norm_keeps_two_digits(patch: Patch) -> None:
    def norm(right: Any, x: Tensor, *rest: Any, **more: Any) -> Tensor:
        out = right(x, *rest, **more)
        return out if out.dtype == x.dtype == torch.float32 else out.to(torch.float8_e5m2).to(out.dtype)

    wrap(patch, torch.nn.functional, "layer_norm", norm)


@fault_in("saved")
def weights_are_saved_in_half_precision(patch: Patch) -> None:
    def write(right: Any, file: Path, tensors: dict[str, Tensor]) -> None:
        right(file, {name: t.half().float() for name, t in tensors.items()})

    wrap(patch, modeldir, "write_tensors", write)


@fault_in("causal")
def the_mask_is_off_by_one(patch: Patch) -> None:
    def visibility(right: Any, config: Any, tokens: Tensor, *rest: Any) -> Any:
        see = right(config, tokens, *rest)
        return see if see.dense is None else type(see)(see.dense | see.dense.roll(1, -1), see.banded, see.is_causal)

    wrap(patch, gpt, "visibility", visibility)


@fault_in("overfitted")
def the_optimizer_never_steps(patch: Patch) -> None:
    wrap(patch, Optimizers, "step", lambda right, self: None)

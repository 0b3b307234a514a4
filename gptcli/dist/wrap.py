"""Laying a model out over processes, from outside the model."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gptcli.config.schema import ParallelSizes, Recipe
from gptcli.dist.runtime import Runtime
from gptcli.errors import UserError


def check_layout(layout: str | ParallelSizes, world_size: int) -> None:
    """Raises UserError for a layout that this version does not have."""
    if world_size == 1:
        return
    if isinstance(layout, ParallelSizes):
        is_ddp = layout.fsdp == layout.tp == 1 and layout.dp == world_size
        named = f"{{dp: {layout.dp}, fsdp: {layout.fsdp}, tp: {layout.tp}}}"
    else:
        is_ddp, named = layout == "ddp", layout
    if not is_ddp:
        raise UserError(f"parallel: {named}: {world_size} processes can be laid out as ddp alone in this version")


def parallelize(model: nn.Module, recipe: Recipe, runtime: Runtime) -> nn.Module:
    """The module to call in training: the model itself, or its DDP wrapper."""
    if runtime.world_size == 1:
        return model
    ids = [runtime.local_rank] if runtime.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def no_grad_sync(model: nn.Module, skip: bool) -> contextlib.AbstractContextManager[Any]:
    """While accumulating, gradients are summed over the replicas only with the last micro-batch."""
    if skip and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()

"""Who this process is among the others, and the few things they say to each other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gptcli.errors import UserError


@dataclass(frozen=True)
class Runtime:
    """Ranks and device. dp_rank and dp_size count data-parallel replicas; losses and data use them alone."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def host_sum(self, values: list[float]) -> list[float]:
        """Sum host numbers over the replicas without touching the device."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def all_sum(self, tensor: Tensor) -> Tensor:
        """The sum of a device tensor over the replicas."""
        if self.world_size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        if self.world_size > 1:
            self.host_sum([0.0])

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block first (it fills a cache, say), then the others."""
        if not self.is_main:
            self.barrier()
        try:
            yield
        finally:
            if self.is_main:
                self.barrier()


def pick_device(name: str) -> torch.device:
    """auto | cpu | cuda | mps. Raises UserError for one that is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    if name not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: expected auto, cpu, cuda or mps")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: torch sees no Apple GPU here")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the arithmetic. auto: bf16 where the hardware multiplies it, else fp32.

    A CPU without bf16 units emulates it 20 to 50 times slower, so there `auto` is fp32. Raises UserError.
    """
    if name == "fp32":
        return torch.float32
    if name == "bf16":
        return torch.bfloat16
    if name != "auto":
        raise UserError(f"precision: {name!r} is none of auto, fp32, bf16")
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def autocast(
    device: torch.device, dtype: torch.dtype, *, cache: bool = True
) -> contextlib.AbstractContextManager[object]:
    """bf16 arithmetic on fp32 weights, or nothing: on a CPU, autocast only costs. cache: keep the weights' copies."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype, cache_enabled=cache)


@contextlib.contextmanager
def runtime(device: str = "auto") -> Iterator[Runtime]:
    """Join the process group that the launcher announced in the environment, if any."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    picked = pick_device(device)
    if world_size == 1:
        yield Runtime(device=picked)
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if picked.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"--nproc {local_size}: this machine has {torch.cuda.device_count()} GPUs")
        picked = torch.device("cuda", local_rank)
        torch.cuda.set_device(picked)
        backend = "cpu:gloo,cuda:nccl"
    else:
        # Compute-bound processes that share cores collapse when each spins on all of them.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
        backend = "gloo"
    dist.init_process_group(backend, device_id=picked if picked.type == "cuda" else None)
    try:
        yield Runtime(rank, local_rank, world_size, rank, world_size, picked)
    finally:
        dist.destroy_process_group()

"""GPUs by name: memory, speed, and what an hour costs, which is an assumption that `gpt plan --price` replaces."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from gptcli.errors import UserError, nearest


@dataclass(frozen=True)
class Gpu:
    chip: str  # part of the name that the driver gives
    memory: int  # bytes that a process can use, a little less than what is printed on the box
    flops: float | None  # dense bf16 FLOP/s of the vendor's datasheet
    price: float  # US dollars an hour, about what clouds asked without a contract in 2025


def _gpu(chip: str, gib: float, tflops: float, price: float) -> Gpu:
    return Gpu(chip, int(gib * 2**30), tflops * 1e12, price)


GPUS = {
    "b200": _gpu("B200", 178, 2250, 5.50),
    "h200": _gpu("H200", 139, 989, 3.50),
    "h100": _gpu("H100", 79, 989, 2.50),
    "a100": _gpu("A100", 79, 312, 1.50),
    "a100-40gb": _gpu("A100", 39, 312, 1.20),
    "l40s": _gpu("L40S", 44, 362, 0.90),
    "a10": _gpu("A10", 22, 125, 0.60),
    "l4": _gpu("L4", 22, 121, 0.60),
    "v100": _gpu("V100", 31, 125, 0.50),
    "rtx4090": _gpu("4090", 23, 165, 0.40),
    "rtx3090": _gpu("3090", 23, 71, 0.25),
}


def find_gpu(name: str) -> Gpu:
    """By name; `cpu` is this machine, whose memory is known and whose speed is not."""
    if name == "cpu":
        memory = machine_memory()
        if memory is None:
            raise UserError("--gpu cpu: this system does not say how much memory it has")
        return Gpu("cpu", memory, None, 0.0)
    if name not in GPUS:
        known = [*GPUS, "cpu"]
        raise UserError(f"--gpu {name}: expected one of {', '.join(known)}{nearest(name, known)}")
    return GPUS[name]


def peak_flops_of(device_name: str) -> float | None:
    """By the name that the driver gives; the longest match, since an L40S is no L4."""
    found = [gpu for gpu in GPUS.values() if gpu.chip in device_name]
    return max(found, key=lambda gpu: len(gpu.chip)).flops if found else None


def machine_memory() -> int | None:
    """Bytes of this machine's memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def has_cpp_compiler() -> bool:
    """What torch.compile needs for code that runs on a CPU."""
    return bool(os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++"))


def cpu_vendor() -> str:
    """As the CPU calls itself, "AuthenticAMD" for one; empty where the system does not say."""
    windows = platform.processor().rpartition(" ")[2]  # "AMD64 Family 25 Model 97, AuthenticAMD"
    return _cpuinfo("vendor_id") or windows


def cpu_features() -> str:
    """What tells this CPU's instructions from those of another of its family; empty where the system does not say."""
    return " ".join(filter(None, map(_cpuinfo, ("model name", "flags", "Features"))))


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")

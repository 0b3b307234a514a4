"""metrics.jsonl, optional TensorBoard, and the speed of a run in tokens and in percent of its limit."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Protocol

import torch

from gptcli.config.gpus import peak_flops_of
from gptcli.errors import UserError
from gptcli.model.linear import product


class Logger(Protocol):
    def write(self, row: dict[str, Any]) -> None: ...


class MetricsFile:
    """One JSON object a logged step. A resume cuts what came after its checkpoint: no gap, no repeat."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        path.touch()
        cut_after(path, resume_step)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoardLogger:
    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("train.loggers: tensorboard is not installed; pip install 'gptcli[tensorboard]'") from None
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)

    def write(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()


def cut_after(path: Path, step: int) -> None:
    """Leave out of a file of rows with a "step", if there is one, those that come after it."""
    if path.is_file():
        path.write_text("".join(line for row, line in _rows(path) if row["step"] <= step), "utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    return [row for row, _ in _rows(path)]


def _rows(path: Path) -> list[tuple[dict[str, Any], str]]:
    """Whole rows; a last one that a kill cut short is left out."""
    out = []
    if path.is_file():
        for line in path.read_text("utf-8", errors="replace").splitlines(keepends=True):
            try:
                out.append((json.loads(line), line))
            except ValueError:
                break
    return out


class Speed:
    """Tokens per second since the last reading, and MFU: the share of the device's peak."""

    def __init__(self, flops_per_token: int, devices: int, peak: float | None) -> None:
        self._flops, self._peak = flops_per_token, peak * devices if peak else None
        self._time, self._tokens = time.perf_counter(), 0

    def restart(self, tokens: int) -> None:
        self._time, self._tokens = time.perf_counter(), tokens

    def skip(self, seconds: float) -> None:
        """Leave out time spent on something that is not training."""
        self._time += seconds

    def read(self, tokens: int) -> tuple[float, float | None]:
        now = time.perf_counter()
        rate = (tokens - self._tokens) / max(now - self._time, 1e-9)
        self._time, self._tokens = now, tokens
        return rate, rate * self._flops / self._peak if self._peak else None


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that MFU divides by: the datasheet's for a known GPU, a measured fp32 product on a CPU."""
    if device.type == "cuda":
        return peak_flops_of(torch.cuda.get_device_name(device))
    if device.type != "cpu":
        return None
    a = torch.ones(1024, 1024)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        product(a, a)
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best

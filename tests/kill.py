"""Runs that are killed with -9 and resumed, beside the same run left alone."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.conftest import Tiny, gpt


def start(tiny: Tiny, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "gptcli", tiny.stage, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tiny.folder,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 60) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        if condition():
            return True
        time.sleep(0.002)
    return False


def rows(tiny: Tiny) -> list[str]:
    file = tiny.run_dir / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def kill_and_resume(make: Callable[[Path], Tiny], folder: Path, kills: int, *overrides: str) -> None:
    """Kill -9 at random steps, every third time in the middle of a save, then compare with a run left alone.
    `make` makes the same run in a given folder."""
    expected, tiny = (make(_new(folder / name)) for name in ("left-alone", "killed"))
    expected.train(*overrides)
    steps, draw = len(expected.metrics()), random.Random(0)
    killed = 0
    for number in range(kills):
        if not tiny.latest().exists():
            shutil.rmtree(tiny.run_dir, ignore_errors=True)
        process = start(tiny, *_first_or_resumed(tiny, overrides))
        seen = len(rows(tiny))
        if number % 3 == 2:
            wait_for(lambda: any(tiny.run_dir.glob(".step-*.tmp")), process)
        else:
            wanted = seen + draw.randint(1, steps // kills)
            wait_for(lambda wanted=wanted: len(rows(tiny)) >= wanted, process)  # type: ignore[misc]
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    assert killed > kills // 2  # on a busy machine one may have ended by itself
    done = gpt(tiny.stage, *_first_or_resumed(tiny, overrides), cwd=tiny.folder)
    assert done.code == 0, done.err
    assert tiny.metrics() == expected.metrics()
    ours, theirs = tiny.weights(), expected.weights()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert not list(tiny.run_dir.glob(".step-*"))


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _first_or_resumed(tiny: Tiny, overrides: tuple[str, ...]) -> list[str]:
    if tiny.latest().exists():
        return ["--resume", str(tiny.run_dir)]
    return ["-r", str(tiny.recipe), *(part for o in overrides for part in ("-s", o))]

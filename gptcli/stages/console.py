"""What a run says while it goes: a live line on a terminal, plain lines in a pipe, nothing when quiet. On stderr."""

from __future__ import annotations

import os
import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class _Lines(Console):
    def on_broken_pipe(self) -> None:
        """rich would end the process."""
        raise BrokenPipeError


class RunConsole:
    def __init__(self, *, quiet: bool = False, is_main: bool = True) -> None:
        self.quiet = quiet or not is_main
        self.console = _Lines(file=sys.stderr, soft_wrap=True, highlight=False, markup=False)
        self._progress: Progress | None = None
        self._task: Any = None

    def say(self, line: str) -> None:
        if self.quiet:
            return
        try:
            (self._progress.console if self._progress else self.console).print(line)
        except OSError:  # whoever read it has gone: no reason to end a training
            self.quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())

    def __enter__(self) -> RunConsole:
        if not self.quiet and self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task("starting", total=1.0)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None

    def step(self, row: dict[str, Any], progress: float, seconds_left: float | None) -> None:
        """A logged step: the bar moves, or a plain line is printed; a validation always leaves a line."""
        words = describe_row(row)
        if self._progress:
            self._progress.update(self._task, completed=progress, description=words)
            if "val_loss" in row:
                self.say(words)
        else:
            left = f"  {_clock(seconds_left)} left" if seconds_left is not None else ""
            self.say(words + left)


def describe_row(row: dict[str, Any]) -> str:
    parts = [f"step {row['step']}", f"loss {row['loss']:.4f}"]
    if "val_score" in row:
        reward = f", held-out reward {row['val_held_out_reward']:.3f}" if "val_held_out_reward" in row else ""
        parts.append(f"held out: score {row['val_score']:.3f}  KL {row['val_kl']:.3f}{reward}")
    elif "val_loss" in row:
        parts.append(f"held out {row['val_loss']:.4f}")
        shown = ("val_accuracy", "val_length_accuracy", "val_f1", "val_matthews", "val_pearson", "val_spearman")
        parts += [f"{name.removeprefix('val_')} {row[name]:.4f}" for name in shown if name in row]
    if "score" in row:
        parts.append(f"score {row['score']:.3f}  KL {row['kl']:.3f}")
    parts += [f"lr {row['lr']:.2e}", f"{_short(row['tokens_per_second'])} tok/s"]
    if row.get("mfu"):
        parts.append(f"MFU {100 * row['mfu']:.0f}%")
    return "  ".join(parts)


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{number:.0f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

"""Checkpoints: a model directory plus `training/`. Complete or absent, never half; nothing unpickles.

RUN/step-000500/                model.safetensors config.json tokenizer.json
RUN/step-000500/training/       optimizer.safetensors state.json manifest.json (source.safetensors)
RUN/latest, RUN/best            symlinks to one of them
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from gptcli.errors import GptError, UserError
from gptcli.files import publish_folder, sync
from gptcli.modeldir import CONFIG, read_json, read_tensors, write_json, write_tensors
from gptcli.train.state import TrainState

FORMAT_VERSION = 1
TRAINING, SOURCE = "training", "source.safetensors"
STEP_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Training:
    """The contents of `training/`: what a resume needs beside the model."""

    state: TrainState
    source: dict[str, Any]  # JSON, and tensors
    optimizer: dict[str, Tensor]
    facts: dict[str, Any]  # hashes of tokenizer and data, micro_batch_size, version, parent


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def save_checkpoint(run_dir: Path, training: Training, write_model: Callable[[Path], None], *, best: bool) -> Path:
    """Write RUN/step-N, then move `latest` (and `best`) to it. Raises GptError if the disk does not take it."""
    name = step_name(training.state.step)

    def fill(work: Path) -> None:
        (work / TRAINING).mkdir()
        write_model(work)
        save_file(training.optimizer, work / TRAINING / "optimizer.safetensors")
        tensors = {name: value for name, value in training.source.items() if isinstance(value, Tensor)}
        if tensors:
            write_tensors(work / TRAINING / SOURCE, tensors)
        tree = {
            "format_version": FORMAT_VERSION,
            **asdict(training.state),
            "source": {name: value for name, value in training.source.items() if name not in tensors},
            **training.facts,
        }
        write_json(work / TRAINING / "state.json", tree)
        _write_manifest(work)

    try:
        publish_folder(run_dir / name, fill)
        _point(run_dir / "latest", name)
        if best:
            _point(run_dir / "best", name)
        sync(run_dir)
    except Exception as error:  # a full disk is an OSError here, and safetensors' own error there
        reason = getattr(error, "strerror", None) or error
        raise GptError(f"{run_dir / name}: cannot save ({reason}); {what_is_kept(run_dir)}") from error
    return run_dir / name


def load_training(checkpoint: Path) -> Training:
    """The training state of a checkpoint, every file checked against its manifest. Raises UserError."""
    folder = checkpoint / TRAINING
    if not folder.is_dir():
        raise UserError(f"{checkpoint}: holds a model but no training state, so it cannot be resumed; use init_from")
    verify(checkpoint)
    tree = read_json(folder / "state.json", missing=f"{folder}/state.json: missing")
    if tree.pop("format_version", None) != FORMAT_VERSION:
        raise UserError(f"{folder}/state.json: of another format_version than this gptcli reads ({FORMAT_VERSION})")
    fields = {name: tree.pop(name) for name in TrainState.__dataclass_fields__ if name in tree}
    source = tree.pop("source")
    if (folder / SOURCE).is_file():
        source |= read_tensors(folder / SOURCE)
    return Training(TrainState(**fields), source, read_tensors(folder / "optimizer.safetensors"), tree)


def what_is_kept(run_dir: Path) -> str:
    """For the message of a run that cannot go on."""
    last = run_dir / "latest"
    return f"the last checkpoint is {last.resolve()}" if last.exists() else "no checkpoint was saved before"


def verify(checkpoint: Path) -> None:
    """Raises UserError naming the first file that is not what was saved."""
    manifest = checkpoint / TRAINING / "manifest.json"
    files = read_json(manifest, missing=f"{manifest}: missing; this checkpoint is not complete")["files"]
    for name, expected in files.items():
        file = checkpoint / name
        if not file.is_file():
            raise UserError(f"{file}: missing; this checkpoint is not complete")
        if digest_of(file) != expected:
            raise UserError(f"{file}: damaged or cut short (its hash is not the manifest's)")


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint directory from itself or from a run directory (its `latest`). Raises UserError."""
    path = Path(path)
    if (path / CONFIG).is_file():
        return path.resolve() if path.is_symlink() else path
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint or run")
    if not path.is_dir():
        raise UserError(f"{path}: is a file; a checkpoint is a folder (a run's, or one of `gpt import`)")
    if (path / "latest" / CONFIG).is_file():
        return path / os.readlink(path / "latest") if (path / "latest").is_symlink() else path / "latest"
    if steps := checkpoints(path):
        return steps[-1]
    if (path / "recipe.yaml").is_file():
        raise UserError(f"{path}: this run has not saved a checkpoint yet; begin it again, without --resume")
    raise UserError(f"{path}: holds no checkpoint (no {CONFIG} and no latest/)")


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [p for p in run_dir.iterdir() if STEP_NAME.fullmatch(p.name) and (p / CONFIG).is_file()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def newest_checkpoint(runs: Path) -> Path | None:
    """The checkpoint written last under any run in `runs`; an imported model lies there without steps."""
    folders = [run for run in runs.iterdir() if run.is_dir() and run.name[:1] != "."] if runs.is_dir() else []
    found = [c for run in folders for c in ([run] if (run / CONFIG).is_file() else checkpoints(run))]
    return max(found, key=lambda c: (c / CONFIG).stat().st_mtime_ns, default=None)


def prune(run_dir: Path, save_every: int, keep_last: int) -> None:
    """Keep `latest`, `best` and every `save_every`-th step, of those the newest `keep_last` (0: all)."""
    kept = {(run_dir / link).resolve() for link in ("latest", "best")}
    regular = [c for c in checkpoints(run_dir) if save_every and step_of(c) % save_every == 0]
    kept |= {c.resolve() for c in regular[-keep_last:]}
    for old in checkpoints(run_dir):
        if old.resolve() not in kept:
            shutil.rmtree(old)


def remove_unfinished(run_dir: Path) -> None:
    """What a kill in the middle of a save left behind."""
    for path in run_dir.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _point(link: Path, name: str) -> None:
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    os.replace(temporary, link)


def _write_manifest(folder: Path) -> None:
    files = {str(p.relative_to(folder)): digest_of(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    write_json(folder / TRAINING / "manifest.json", {"format_version": FORMAT_VERSION, "files": files})


def digest_of(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

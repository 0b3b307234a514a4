"""What `make quickstart` and `make tour` are made of: commands that are printed as they run."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

GPT = str(Path(sys.executable).with_name("gpt"))


def gpt(*arguments: str, folder: Path = Path()) -> None:
    run("gpt", [GPT, *arguments], folder)


def run(shown: str, command: Sequence[str], folder: Path = Path()) -> None:
    """Ends this program too if the command fails. `shown` stands for its first word."""
    print(f"$ {shlex.join([shown, *command[1:]])}", flush=True)
    status = subprocess.run(command, cwd=folder, check=False).returncode
    if status:
        sys.exit(status)


def train(verb: str, recipe: str, name: str, *arguments: str, folder: Path = Path()) -> None:
    """A run of that recipe, or the rest of it; nothing where it is done."""
    step = steps_done(folder / name)
    if step is None:
        gpt(verb, "-r", recipe, *arguments, folder=folder)
    elif step < max_steps(folder / name):
        gpt(verb, "--resume", name, folder=folder)
    else:
        print(f"{folder / name} is trained already; remove it to train again")


def steps_done(folder: Path) -> int | None:
    state = folder / "latest" / "training" / "state.json"
    return int(json.loads(state.read_text())["step"]) if state.is_file() else None


def max_steps(folder: Path) -> int:
    import yaml

    return int(yaml.safe_load((folder / "recipe.yaml").read_text())["train"]["max_steps"])


def short(*arguments: str) -> str:
    return f"{os.path.relpath(GPT)} {shlex.join(arguments)}"

"""What `make quickstart` runs: train a small GPT on the Python standard library, and see what it has learnt.

It is the command line and nothing else: each step prints the `gpt` command that does it.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

GPT = str(Path(sys.executable).with_name("gpt"))
RUN = Path("runs/quickstart")


def main() -> int:
    started = time.monotonic()
    if not (RUN / "latest").exists():
        gpt("pretrain", "--recipe", "quickstart.yaml")
    elif json.loads((RUN / "latest" / "training" / "state.json").read_text())["step"] < max_steps():
        gpt("pretrain", "--resume", str(RUN))
    else:
        print(f"{RUN} is trained already; remove it to train again")
    print("\nHow well does it know Python? A better predictor is a better compressor.")
    gpt("eval", "--checkpoint", str(RUN), "--task", "compression")
    print("\nA sample:")
    gpt("generate", "def main", "--checkpoint", str(RUN), "--top-p", "0.9", "--seed", "2", "--echo")
    print(f"\n{time.monotonic() - started:.0f} seconds. Try next:")
    print("  " + short("generate", "class Stack:", "--top-p", "0.9"))
    print("  " + short("eval", "--task", "perplexity", "--data", "README.md"))
    print("  " + short("pretrain", "--recipe", "quickstart.yaml", "-s", "run.name=mine", "-s", "data.source=[FOLDER]"))
    return 0


def max_steps() -> int:
    import yaml

    return int(yaml.safe_load((RUN / "recipe.yaml").read_text())["train"]["max_steps"])


def gpt(*arguments: str) -> None:
    print(f"$ gpt {shlex.join(arguments)}", flush=True)
    status = subprocess.run([GPT, *arguments], check=False).returncode
    if status:
        sys.exit(status)


def short(*arguments: str) -> str:
    return f"{os.path.relpath(GPT)} {shlex.join(arguments)}"


if __name__ == "__main__":
    sys.exit(main())

"""What `make quickstart` runs: train a small GPT on the Python standard library, and see what it has learnt.

It is the command line and nothing else: each step prints the `gpt` command that does it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from steps import gpt, short, train

RUN = Path("runs/quickstart")


def main() -> int:
    started = time.monotonic()
    train("pretrain", "quickstart.yaml", str(RUN))
    print("\nHow well does it know Python? A better predictor is a better compressor.")
    gpt("eval", "--checkpoint", str(RUN), "--task", "compression")
    print("\nA sample:")
    gpt("generate", "def main", "--checkpoint", str(RUN), "--top-p", "0.9", "--seed", "2", "--echo")
    print(f"\n{time.monotonic() - started:.0f} seconds. Try next:")
    print("  " + short("generate", "class Stack:", "--top-p", "0.9"))
    print("  " + short("eval", "--task", "perplexity", "--data", "README.md"))
    print("  " + short("pretrain", "--recipe", "quickstart.yaml", "-s", "run.name=mine", "-s", "data.source=[FOLDER]"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

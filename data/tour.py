"""What `make tour` runs: the whole life of a small GPT, each stage a command that can be repeated by hand.

Pretrained on the standard library, it learns to write the bodies of its functions (sft), to tell real code from
damaged (a reward model), and to write bodies that parse and do anything (PPO and GRPO, judged by a program).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from steps import gpt, run, short, train

RECIPES = Path(__file__).parent / "tour"
WRITERS = {"pretrained": "../quickstart", "sft": "sft", "ppo": "ppo", "grpo": "grpo"}
NEW_TOKENS = 96  # as in ppo.yaml and grpo.yaml
FORMS = {  # of the table's columns
    "parses": "{:.1%}",
    "kl": "{:.2f}",
    "tokens": "{:.1f}",
    "duplicates": "{:.1%}",
    "ends": "{:.1%}",
    "entropy": "{:.2f}",
}


def main() -> int:
    parser = argparse.ArgumentParser(description="The whole life of a small GPT, stage by stage.")
    parser.add_argument("--seeds", type=int, default=1, help="live so many lives after the same pretraining")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where all of it lies")
    parser.add_argument("--steps", type=int, help="of every stage, to see quickly that it runs")
    options = parser.parse_args()
    started = time.monotonic()
    few = [] if options.steps is None else ["-s", f"train.max_steps={options.steps}"]
    train("pretrain", "quickstart.yaml", str(options.runs / "quickstart"), "-s", f"run.dir={options.runs}", *few)
    lives = [live(options.runs / f"tour-{seed}", seed, few) for seed in range(1, options.seeds + 1)]
    report = {"seconds": round(time.monotonic() - started), "lives": lives}
    (options.runs / "tour.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    show(lives, options.runs / "tour-1")
    print(f"{report['seconds']} seconds; the figures are in {options.runs / 'tour.json'}. Try next:")
    print("  " + short("report", str(options.runs / "tour-1/ppo"), "-o", "ppo.html"))
    print(f"  change {options.runs / 'tour-1/ppo.yaml'} (a lower ppo.kl_coef?), remove its folder ppo, make tour")
    return 0


def live(folder: Path, seed: int, few: list[str]) -> dict[str, Any]:
    """All stages after pretraining, in a folder with recipes of its own. Returns the figures."""
    if not folder.exists():
        shutil.copytree(RECIPES, folder, ignore=shutil.ignore_patterns("__pycache__"))
    print(f"\n$ cd {folder}")
    if not (folder / "damaged-val.jsonl").exists():
        run("python", [sys.executable, "functions.py", "../quickstart", "--seed", str(seed)], folder)
    for verb in ("sft", "rlhf-reward", "rlhf-ppo", "rlhf-grpo"):
        name = verb.removeprefix("rlhf-")
        train(verb, f"{name}.yaml", name, "--seed", str(seed), *few, folder=folder)
    gpt("eval", "-c", "../quickstart", "--task", "damaged.yaml", "-o", "damaged.json", folder=folder)
    for name, checkpoint in WRITERS.items():
        where = ["-c", checkpoint, "-i", "prompts-val.jsonl", "-o", f"{name}.answers.jsonl", "--overwrite"]
        gpt("generate", *where, "--max-new-tokens", str(NEW_TOKENS), "--seed", str(seed), folder=folder)
    return {"seed": seed, "reward_model": judged(folder), **{name: written(folder, name) for name in WRITERS}}


# ---- figures --------------------------------------------------------------------------------------------------


def judged(folder: Path) -> dict[str, float]:
    """How often each tells the real body from the damaged one, on files that nothing was trained on."""
    row = [row for row in read(folder / "reward/metrics.jsonl") if "val_accuracy" in row][-1]
    likelihood = json.loads((folder / "damaged.json").read_text())
    return {
        "accuracy": row["val_accuracy"],
        "likelihood_accuracy": likelihood["acc"],
        "length_accuracy": row["val_length_accuracy"],
        "pairs": likelihood["n"],
    }


def written(folder: Path, name: str) -> dict[str, float | None]:
    """How good the answers are, and by what trick."""
    rows = read(folder / f"{name}.answers.jsonl")
    texts = [row["text"] for row in rows]
    rollout = last_rollout(folder, name)
    return {
        "parses": statistics.mean(load_score(folder)([row["prompt"] for row in rows], texts)),
        "ends": statistics.mean(row["finish_reason"] != "length" for row in rows),
        "tokens": statistics.mean(row["tokens"] for row in rows),
        "duplicates": 1 - len(set(texts)) / len(texts),
        "kl": rollout.get("kl"),
        "entropy": rollout.get("entropy"),
    }


def last_rollout(folder: Path, name: str) -> dict[str, Any]:
    """The figures of what a policy wrote last; of sft, of what PPO wrote before it learned anything."""
    if name == "sft":
        return read(folder / "ppo/metrics.jsonl")[0]
    return read(folder / name / "metrics.jsonl")[-1] if name in ("ppo", "grpo") else {}


def load_score(folder: Path) -> Callable[[list[str], list[str]], list[float]]:
    """The very function that PPO was rewarded by."""
    spec = importlib.util.spec_from_file_location("reward", folder / "reward.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.score


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# ---- what is shown --------------------------------------------------------------------------------------------


def show(lives: list[dict[str, Any]], folder: Path) -> None:
    console = Console()
    prompt = read(folder / "prompts-val.jsonl")[0]["prompt"]
    for name in WRITERS:
        answer = read(folder / f"{name}.answers.jsonl")[0]["text"]
        console.print(f"\n[bold]{name}[/] goes on:", highlight=False)
        console.print(prompt + answer, markup=False, highlight=False)
    console.print(writers_table(lives, len(read(folder / "prompts-val.jsonl"))))
    console.print(judges_table(lives))


def writers_table(lives: list[dict[str, Any]], count: int) -> Table:
    table = Table(
        title=f"\n{count} bodies written for held-out heads",
        caption="parses: and does anything; KL: to sft, in nats a body, of the last rollout; entropy: in nats a token",
    )
    for column in ("seed", "model", "parses", "KL", "tokens", "duplicates", "ends", "entropy"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for life in lives:
        for name in WRITERS:
            figures = life[name]
            cells = [form.format(figures[key]) if figures[key] is not None else "" for key, form in FORMS.items()]
            table.add_row(str(life["seed"]), name, *cells)
        table.add_section()
    return table


def judges_table(lives: list[dict[str, Any]]) -> Table:
    table = Table(title="\nWhich of two bodies is real, and which has one token edited? Right on held-out pairs:")
    for column in ("seed", "reward model", "likelier for the pretrained", "by length", "pairs"):
        table.add_column(column, justify="right")
    for life in lives:
        judge = life["reward_model"]
        shares = [f"{judge[f'{name}accuracy']:.1%}" for name in ("", "likelihood_", "length_")]
        table.add_row(str(life["seed"]), *shares, str(judge["pairs"]))
    return table


if __name__ == "__main__":
    sys.exit(main())

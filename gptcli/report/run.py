"""A run as sections: what came out, its curves, samples, figures, where it comes from, and the recipe."""

from __future__ import annotations

import json
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from gptcli.errors import UserError
from gptcli.eval.results import Result
from gptcli.exchange.card import read_lineage
from gptcli.modeldir import read_json
from gptcli.report.chart import chart
from gptcli.report.page import Section, details, page, pre, table
from gptcli.report.results import results_of_run, results_table
from gptcli.report.rollouts import CURVES as ROLLOUT_CURVES
from gptcli.report.rollouts import frontier, is_rollout_run, rollout_overview, rollout_row, written
from gptcli.rlhf.evaluations import Evaluation, find_turn, read_evaluations
from gptcli.train.checkpoint import find_checkpoint
from gptcli.train.metrics import read_metrics

CURVES = {"loss": ("loss", "val_loss"), "learning rate": ("lr",), "gradient norm": ("grad_norm",)}
NO_CURVE = {"step", "tokens", "mfu"}
HASHES = {"data_hash": "Data's hash", "tokenizer_hash": "Tokenizer's hash"}
OPEN_SAMPLES = 3  # the newest, unfolded


@dataclass(frozen=True)
class Link:
    """One checkpoint of a lineage."""

    checkpoint: str
    facts: list[tuple[str, str]]


@dataclass(frozen=True)
class Run:
    """All that a report reads of a run."""

    path: Path
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    recipe: str
    lineage: list[Link]
    results: list[Result]
    evaluations: list[Evaluation]  # of PPO and GRPO


def is_run(path: Path) -> bool:
    return (path / "recipe.yaml").is_file()


def read_run(path: Path, results: list[Result]) -> Run:
    """`results` join those that lie in the run."""
    if not is_run(path):
        raise UserError(f"{path}: neither a run (no recipe.yaml) nor a file of `gpt eval -o`")
    own = results_of_run(path)
    return Run(
        path,
        read_metrics(path / "metrics.jsonl"),
        _read_samples(path / "samples.jsonl"),
        (path / "recipe.yaml").read_text("utf-8"),
        lineage_of(path),
        own + [result for result in results if result not in own],
        read_evaluations(path),
    )


def lineage_of(path: Path) -> list[Link]:
    """The run's checkpoint, the one it began with, and so on, as far back as they are still here."""
    chain: list[Link] = []
    parent: str | None = str(path)
    while parent is not None:
        try:
            checkpoint = find_checkpoint(parent)
        except UserError:
            if chain:  # else the run has not saved yet
                chain.append(Link(parent, [("", "no longer here")]))
            break
        if any(link.checkpoint == str(checkpoint) for link in chain):
            break
        state = _state_of(checkpoint)
        hashes = [(words, str(state[key])) for key, words in HASHES.items() if key in state]
        chain.append(Link(str(checkpoint), read_lineage(checkpoint) + hashes))
        parent = state.get("parent")
    return chain


def _state_of(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint / "training" / "state.json"
    return read_json(file, missing="") if file.is_file() else {}


def _read_samples(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text("utf-8").splitlines() if line.endswith("}")]


def run_row(run: Run) -> dict[str, Any]:
    """For scripts."""
    rollouts = rollout_row(run.evaluations) if is_rollout_run(run.metrics) else {}
    return {
        "run_dir": str(run.path),
        "last": run.metrics[-1] if run.metrics else None,
        "best_val_loss": min((row["val_loss"] for row in run.metrics if "val_loss" in row), default=None),
        "samples": len(run.samples),
        "lineage": [{"checkpoint": link.checkpoint, **dict(link.facts)} for link in run.lineage],
        "results": [result.to_json(items=False) for result in run.results],
        **rollouts,
    }


def overview(run: Run) -> list[tuple[str, str]]:
    if not run.metrics:
        return []
    last, best, rollouts = run.metrics[-1], run_row(run)["best_val_loss"], is_rollout_run(run.metrics)
    words = {
        "Steps": f"{last['step']:,}",
        "Tokens": f"{last['tokens']:,}",
        "Training loss": f"{last['loss']:.4f}",
        "Best held-out loss": None if best is None or rollouts else f"{best:.4f}",
        "Tokens per second": f"{last['tokens_per_second']:,.0f}",
        "Of the device's peak": f"{last['mfu']:.1%}" if last.get("mfu") else None,
    }
    rows = [(name, value) for name, value in words.items() if value is not None]
    return rows + (rollout_overview(run.metrics, run.evaluations) if rollouts else [])


def warnings(run: Run) -> list[str]:
    turn = find_turn(run.evaluations)
    return [] if turn is None else [f"Warning: {turn}"]


def curves(run: Run) -> str:
    """The usual ones, and whatever else the stage logs."""
    usual, known = CURVES, {name for names in CURVES.values() for name in names} | NO_CURVE
    if is_rollout_run(run.metrics):  # whose val_loss is a reward's negative, drawn as what it is
        usual = ROLLOUT_CURVES | CURVES | {"loss": ("loss",)}
        known |= {name for names in ROLLOUT_CURVES.values() for name in names}
    others = dict.fromkeys(name for row in run.metrics for name in row if name not in known)
    charts = []
    for title, names in (usual | {name.replace("_", " "): (name,) for name in others}).items():
        lines = {
            name: [(row["tokens"], row[name]) for row in run.metrics if isinstance(row.get(name), int | float)]
            for name in names
        }
        charts.append(chart(title, lines, xlabel="tokens"))
    return in_columns("".join(charts))


def in_columns(charts: str) -> str:
    return f'<div class="charts">{charts}</div>' if charts else ""


def samples(run: Run) -> str:
    newest = list(reversed(run.samples))
    return "".join(
        details(f"step {row['step']:,}", pre(row["prompt"] + row["text"]), is_open=i < OPEN_SAMPLES)
        for i, row in enumerate(newest)
    )


def lineage(run: Run) -> str:
    return "".join(
        f"{'<p>which began with</p>' if i else ''}{table([('Checkpoint', link.checkpoint), *link.facts])}"
        for i, link in enumerate(run.lineage)
    )


def sections(run: Run) -> list[Section]:
    """In the page's order. A stage that has more to tell adds to these."""
    rollouts = is_rollout_run(run.metrics)
    return [
        Section("Overview", "".join(f"<p>{escape(w)}</p>" for w in warnings(run)) + table(overview(run))),
        *([Section("Reward", in_columns(frontier(run.metrics, run.evaluations)))] if rollouts else []),
        Section("Curves", curves(run)),
        Section("Evaluation", table(results_table(run.results, main_only=False), heading=True) if run.results else ""),
        *([Section("Held-out prompts", written(run.evaluations))] if rollouts else []),
        Section("Samples", samples(run)),
        Section("Lineage", lineage(run)),
        Section("Recipe", pre(run.recipe)),
    ]


def run_page(run: Run) -> str:
    return page(str(run.path), sections(run))

"""The page of a run of PPO or GRPO, from its files alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from gptcli.report.run import overview, read_run, run_page, run_row, sections
from gptcli.rlhf.evaluations import FILE
from tests.report.test_report import is_well_formed
from tests.rlhf.test_evaluations import make


def write_run(folder: Path, held_out: list[float] | None) -> Path:
    """Four validations after the reference's; `held_out` is the mean of each."""
    rng, metrics = np.random.default_rng(0), []
    for step in range(1, 5):
        row = {"step": step, "loss": 0.1, "lr": 1e-3, "grad_norm": 1.0, "tokens": 100 * step, "tokens_per_second": 9.0}
        names = ("score", "kl", "entropy", "response_length", "eos_rate", "clip_fraction", "explained_variance")
        metrics.append(row | dict.fromkeys(names, 0.1 * step) | {"mfu": None, "approx_kl": 0.01})
    (folder / "recipe.yaml").write_text("stage: rlhf-ppo\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    if held_out is not None:
        rows = [make(0, rng.normal(size=200), rng.normal(held_out[0], 1, 200), prompts=50)]
        for step, mean in enumerate(held_out[1:], 1):
            rows.append(make(step, rng.normal(step, 1, 50), rng.normal(mean, 1, 50), kl=1.0 * step))
        rows[-1].responses[0] = "<script>"
        (folder / FILE).write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))
    return folder


def test_what_a_turned_run_shows(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, [0, 2, 4, 3, 0]), [])
    html = run_page(run)
    assert is_well_formed(html)
    assert [s.title for s in sections(run) if s.body][:4] == ["Overview", "Reward", "Curves", "Held-out prompts"]
    for words in (
        "reward against KL", "best of n", "held-out reward against KL", "reward against length", "entropy",
        "end-of-text rate", "clip fraction", "explained variance", "&lt;script&gt;", "0.636 nats",
        "over-optimisation: from step 2 to 4 the held-out reward fell by",
    ):  # fmt: skip
        assert words in html, words
    assert "<script>" not in html
    row = run_row(run)
    assert [point["n"] for point in row["best_of_n"]] == [1, 2, 4]
    assert row["over_optimisation"]["since"] == 2
    json.dumps(row)


@pytest.mark.parametrize("held_out", [[0, 1, 2, 3, 4], None])
def test_a_healthy_run_and_one_without_held_out_prompts(tmp_path: Path, held_out: list[float] | None) -> None:
    run = read_run(write_run(tmp_path, held_out), [])
    html = run_page(run)
    assert is_well_formed(html)
    assert "over-optimisation" not in html
    assert "reward against KL" in html
    assert ("the run had no data.val" in html) == (held_out is None)
    assert run_row(run)["over_optimisation"] is None
    assert dict(overview(run))["Score"] == "0.4"


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    write_run(tmp_path, None)
    for name in ("metrics.jsonl", FILE):
        (tmp_path / name).write_text("")
    assert is_well_formed(run_page(read_run(tmp_path, [])))

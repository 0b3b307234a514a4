"""A reward model and DPO on human preferences, end to end, told beside what length alone gets.

The text is offensive, and is never shown. The model is one that a core trains in a minute, so what is asserted is that
it learns and that its held-out figures are there; they are printed with their chance interval.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import gpt

pytestmark = pytest.mark.slow
HELD_OUT = 0.2  # of 1,500 by a hash of each; four have an empty answer, which skip_bad leaves out
PASS = 38  # steps of 32
PRETRAIN = """\
run: {name: base, dir: runs}
model: {n_layer: 2, n_head: 2, n_embd: 128, context_length: 384, position: rope, norm: rmsnorm, activation: relu2,
  qk_norm: true, bias: false, residual_init: zero}
tokenizer: bpe:4096
optim: {name: muon, muon_lr: 0.01, lr: 2.0e-2, schedule: linear, min_lr_ratio: 0.0, warmup_steps: 20, weight_decay: 0.0}
train: {max_steps: 250, global_batch_size: 8, log_every: 50, eval_every: 0, save_every: 0}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """With a pretrained model in runs/base."""
    made = tmp_path_factory.mktemp("hh")
    (made / "base.yaml").write_text(PRETRAIN)
    source = shared_data / "text/wikitext2/valid.txt"
    done = gpt("pretrain", "-r", "base.yaml", "-q", "-s", f"data.train=[{source}]", cwd=made)
    assert done.code == 0, done.err
    return made


def learn(folder: Path, shared_data: Path, stage: str, passes: int, lr: float) -> list[dict[str, Any]]:
    """The rows that a shipped recipe logs on the transcripts, as it says what it must."""
    sets = (
        "init_from=runs/base",
        f"data.train=[{shared_data / 'pref/hh_harmless_1500.jsonl'}]",
        f"data.val_fraction={HELD_OUT}",
        f"optim.lr={lr}",
        f"train.max_steps={passes * PASS}",
        f"train.eval_every={passes * PASS}",
        "train.log_every=1",
    )
    done = gpt(stage, "-r", stage, "-s", f"run.name={stage}", *(p for s in sets for p in ("-s", s)), cwd=folder)
    assert done.code == 0, done.err
    assert "skipped" in done.err
    assert "the shorter answer is the better one in 5" in done.err
    rows = [json.loads(line) for line in (folder / "runs" / stage / "metrics.jsonl").read_text().splitlines()]
    found = {name: value for name, value in rows[-1].items() if name.startswith("val_")}
    print(stage, json.dumps(found), "where guessing is right in 0.5 +- 0.06")
    assert 0.4 < found["val_accuracy"] < 0.7
    assert 0.5 < found["val_length_accuracy"] < 0.6  # the shorter answer: the direction is that of train
    return rows


def mean(rows: list[dict[str, Any]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def test_a_reward_model_learns_and_is_told_beside_length(folder: Path, shared_data: Path) -> None:
    rows = learn(folder, shared_data, "rlhf-reward", 2, 5e-4)
    assert mean(rows[PASS:], "loss") < math.log(2) - 0.03
    assert mean(rows[PASS:], "score_gap") > mean(rows[:PASS], "score_gap") > 0
    assert rows[-1]["val_loss"] < 0.8  # pairs seen twice are learned by heart, and yet nothing runs away
    assert rows[-1]["val_calibration_error"] < 0.2


def test_dpo_learns_and_is_told_beside_length(folder: Path, shared_data: Path) -> None:
    rows = learn(folder, shared_data, "rlhf-dpo", 1, 1e-4)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # the policy is the reference still
    assert rows[-1]["val_reward_gap"] > 0.05  # and began at 0, and at ln 2
    assert rows[-1]["val_loss"] < math.log(2)

"""Real runs with a reward that is not trained on: one that the trained reward leads astray, one that goes along."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from gptcli.cli.train import report
from gptcli.config.load import build_recipe
from gptcli.dist.runtime import Runtime
from gptcli.errors import UserError
from gptcli.exchange.card import read_lineage
from gptcli.report.run import read_run, run_row
from gptcli.rlhf.evaluations import find_turn, read_evaluations
from gptcli.stages.console import RunConsole
from gptcli.stages.job import run_stage
from tests.conftest import gpt
from tests.rlhf.known_answer import Task, World

# The letter a is asked for; gold wants it up to a quarter of the text, healthy goes along.
LETTERS = Task(
    letters=8,
    length=4,
    ends=False,
    reward="""
def score(prompts, responses):
    return [r.count("a") for r in responses]

def gold(prompts, responses):
    return [1.0 - abs(r.count("a") / len(r) - 0.25) for r in responses]

def healthy(prompts, responses):
    return [r.count("a") ** 0.5 + 0.1 * r.count("b") for r in responses]
""",
)
BLOCKS: dict[str, dict[str, Any]] = {
    "rlhf-ppo": {"ppo": {"kl_coef": 0.05, "rollout_batch_size": 128, "ppo_epochs": 4, "best_of": 4}},
    "rlhf-grpo": {
        "grpo": {"kl_coef": 0.05, "rollout_batch_size": 128, "group_size": 16, "best_of": 4, "kl_estimator": "k1"}
    },
}


class Said(RunConsole):
    """A console whose lines are kept."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path, LETTERS)
    (tmp_path / "held-out.jsonl").write_text('{"prompt": "b"}\n{"prompt": "cd"}\n{"prompt": "e"}\n')
    return made


def tree(world: World, stage: str, judge: str | None, steps: int = 16, name: str = "run") -> dict[str, Any]:
    reward = f"{world.folder / 'reward.py'}:"
    return {
        "stage": stage,
        "run": {"name": name, "dir": str(world.folder), "seed": 1},
        "init_from": str(world.folder / "reference"),
        "data": {
            "train": [str(world.folder / "prompts.jsonl")],
            "val": [str(world.folder / "held-out.jsonl")],
        },
        "optim": {"lr": 2e-2, "schedule": "constant", "weight_decay": 0.0},
        "train": {
            "max_steps": steps,
            "global_batch_size": 128,
            "log_every": 1,
            "eval_every": 4,
            "eval_rows": 64,
            "save_every": 0,
        },
        "sampling": {"max_new_tokens": 4},
        "reward": {"function": reward + "score"},
        "held_out_reward": None if judge is None else {"function": reward + judge},
        **BLOCKS[stage],
    }


def train(made: dict[str, Any], **options: Any) -> tuple[dict[str, Any], list[str]]:
    console = Said()
    recipe = build_recipe(made, where="test", stage=made["stage"])
    return run_stage(recipe, Runtime(), console, **options), console.lines


@pytest.mark.parametrize("stage", BLOCKS)
def test_a_reward_that_leads_astray_is_told(world: World, stage: str) -> None:
    summary, said = train(tree(world, stage, "gold"))
    told = [line for line in said if "over-optimisation" in line]
    assert told
    assert str(world.folder / "run" / "best") in told[-1]
    run = read_run(world.folder / "run", [])
    first, last = run.evaluations[1], run.evaluations[-1]
    assert sum(last.scores) > sum(first.scores)
    assert sum(last.held_out) < sum(first.held_out)
    assert run_row(run)["over_optimisation"]["step"] == 16
    assert summary["val_loss"] == pytest.approx(-sum(last.held_out) / 64)
    facts = dict(read_lineage(world.folder / "run" / "best"))
    best = max(sum(evaluation.held_out or [-math.inf]) for evaluation in run.evaluations[1:]) / 64
    assert facts["Held-out reward"].startswith(f"{best:.4f} (step ")
    told = list[str]()
    report(summary, as_json=False, say=told.append)
    assert f"score {summary['score']:.3f}, KL {summary['kl']:.3f}, held-out score {summary['val_score']:.3f}" in told[0]
    assert "loss" not in told[0]
    assert (world.folder / "run" / "best").resolve().name != "step-000016"


@pytest.mark.parametrize("stage", BLOCKS)
def test_one_that_does_not_is_left_alone(world: World, stage: str) -> None:
    _, said = train(tree(world, stage, "healthy"))
    evaluations = read_evaluations(world.folder / "run")
    assert [e.step for e in evaluations] == [0, 4, 8, 12, 16]
    assert sum(evaluations[-1].held_out) > sum(evaluations[1].held_out)
    assert not [line for line in said if "over-optimisation" in line]
    assert find_turn(evaluations) is None


def test_the_best_of_n_is_that_of_the_reference(world: World) -> None:
    """Two letters of eight: the exact expectation, over all responses, of the best of n."""
    train(tree(world, "rlhf-grpo", None, steps=4))
    reference = read_evaluations(world.folder / "run")[0]
    assert len(reference.scores) == 4 * len(reference.prompts) == 256
    assert reference.held_out is None
    rewards, chances = LETTERS.rewards(), LETTERS.logprobs(world.reference).exp()
    row = run_row(read_run(world.folder / "run", []))
    assert [point["n"] for point in row["best_of_n"]] == [1, 2, 4]
    levels = rewards.unique()
    below = [0.0, *(chances[rewards <= level].sum().item() for level in levels)]
    for point in row["best_of_n"]:  # the prompts differ, and the reference hardly looks at them
        exact = sum(
            level.item() * (below[i + 1] ** point["n"] - below[i] ** point["n"]) for i, level in enumerate(levels)
        )
        assert point["score"] == pytest.approx(exact, abs=0.35)
    assert "over_optimisation" in row


def test_stopped_and_resumed_its_evaluations_are_the_same(world: World) -> None:
    train(tree(world, "rlhf-ppo", "gold", 8, "whole"))
    for steps in (2, 8):
        train(tree(world, "rlhf-ppo", "gold", steps, "parts"), resume=world.folder / "parts" if steps > 2 else None)
    whole, parts = (read_evaluations(world.folder / name) for name in ("whole", "parts"))
    assert [e.step for e in parts] == [0, 2, 4, 8]  # where it was stopped, too
    assert [e for e in parts if e.step != 2] == whole


@pytest.mark.slow
def test_two_processes_are_one(world: World) -> None:
    for name, nproc in (("one", 1), ("two", 2)):
        file = world.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(tree(world, "rlhf-ppo", "gold", 4, name)))
        done = gpt("rlhf-ppo", "-r", file, "--nproc", str(nproc), "-q", cwd=world.folder)
        assert done.code == 0, done.err
    for one, two in zip(*(read_evaluations(world.folder / n) for n in ("one", "two")), strict=True):
        assert one.responses == two.responses
        assert one.held_out == two.held_out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"held_out_reward": {}}, "held_out_reward: where do scores come from"),
        ({"held_out_reward": {"function": "REWARD:other"}}, "held_out_reward.function: .*has no function 'other'"),
        ({"data": {"train": ["prompts.jsonl"]}}, "name .jsonl files of them in data.val"),
        ({"train": {"max_steps": 1, "global_batch_size": 128, "eval_every": 0}}, "0 never looks at held_out_reward"),
    ],
)
def test_a_recipe_that_cannot_work_says_so(world: World, change: dict[str, Any], reason: str) -> None:
    made = {**tree(world, "rlhf-ppo", "gold", 1), **change}
    judge = made["held_out_reward"]
    made["held_out_reward"] = {k: v.replace("REWARD", str(world.folder / "reward.py")) for k, v in judge.items()}
    with pytest.raises(UserError, match=reason):
        train(made)

"""The four stages of RLHF as a user runs them: stopped and resumed, in two processes, on bad input."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from gptcli.config.load import build_recipe
from gptcli.config.schema import LoraBlock
from gptcli.dist.runtime import Runtime
from gptcli.errors import UserError
from gptcli.model.lora import adapter_weights, add_lora
from gptcli.modeldir import open_model_dir, save_adapter
from gptcli.stages.console import RunConsole
from gptcli.stages.job import run_stage
from tests.conftest import Tiny, gpt
from tests.kill import kill_and_resume
from tests.rlhf.known_answer import VARIABLE, World

STAGES = ["rlhf-reward", "rlhf-ppo", "rlhf-dpo", "rlhf-grpo"]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


def make_world(folder: Path) -> World:
    made = World(folder, VARIABLE)
    made.write_pairs(60, seed=1).rename(folder / "pairs.jsonl")
    prompts = "".join(json.dumps({"prompt": p}) + "\n" for p in ("a", "bb", "c"))
    (folder / "prompts.jsonl").write_text(prompts)
    return made


def tree(world: World, stage: str, steps: int = 7, name: str = "run") -> dict[str, Any]:
    """A rollout is 6 steps (two mini-batches, three epochs), so that 7 steps end in the midst of the second."""
    pairs = stage in ("rlhf-reward", "rlhf-dpo")
    rollout = {"rollout_batch_size": 16, "kl_coef": 0.1, "missing_eos_penalty": 1.0}
    blocks: dict[str, dict[str, Any]] = {
        "rlhf-reward": {"reward": {"normalize_samples": 8}},
        "rlhf-ppo": {"ppo": {**rollout, "ppo_epochs": 3, "kl_target": 0.5, "kl_horizon": 100}},
        "rlhf-dpo": {},
        "rlhf-grpo": {"grpo": {**rollout, "epochs": 3, "group_size": 4}},
    }
    reward = {} if pairs else {"reward": {"function": f"{world.folder / 'reward.py'}:score"}}
    return {
        "stage": stage,
        "run": {"name": name, "dir": str(world.folder)},
        "init_from": str(world.folder / "reference"),
        "data": {"train": [str(world.folder / ("pairs.jsonl" if pairs else "prompts.jsonl"))]},
        "optim": {"lr": 1e-2, "schedule": "constant"},
        "train": {"max_steps": steps, "global_batch_size": 8, "log_every": 1, "eval_every": 4, "save_every": 0},
        "sampling": {"max_new_tokens": 4, "temperature": 0.8} if not pairs else {},
        **reward,
        **blocks[stage],
    }


def train(made: dict[str, Any], **options: Any) -> dict[str, Any]:
    recipe = build_recipe(made, where="test", stage=made["stage"])
    return run_stage(recipe, Runtime(), RunConsole(quiet=True), **options)


def rows(world: World, name: str = "run") -> list[dict[str, Any]]:
    lines = (world.folder / name / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("tokens_per_second", "mfu")} for line in lines]


def weights(world: World, name: str = "run") -> dict[str, torch.Tensor]:
    return load_file(world.folder / name / "latest" / "model.safetensors")


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_anywhere_and_resumed_it_ends_with_the_same_bits(world: World, stage: str) -> None:
    train(tree(world, stage, 14, "whole"))
    for steps in (3, 8, 14):  # in the first rollout; in the midst of the second; to the end
        resume = world.folder / "parts" if steps > 3 else None
        train(tree(world, stage, steps, "parts"), resume=resume)
    ours, theirs = weights(world, "parts"), weights(world, "whole")
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    timeless = [[{k: v for k, v in r.items() if not k.startswith("val_")} for r in rows(world, n)] for n in
                ("parts", "whole")]  # fmt: skip
    assert timeless[0] == timeless[1]
    if stage == "rlhf-reward":
        normalization = [(world.folder / n / "latest" / "reward.json").read_text() for n in ("parts", "whole")]
        assert normalization[0] == normalization[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_anywhere_and_resumed_it_ends_with_the_same_bits(tmp_path: Path, stage: str) -> None:
    """In the midst of rollouts too, whose queue is saved with the weights; save_every 10 is no multiple of 6 steps."""

    def make(folder: Path) -> Tiny:
        made = tree(make_world(folder), stage, 120)
        made["train"] |= {"save_every": 10, "eval_every": 0}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(made))
        return Tiny(folder, folder / "recipe.yaml", stage, "run", runs=".")

    kill_and_resume(make, tmp_path, 6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_are_one(world: World, stage: str) -> None:
    for name, nproc in (("one", 1), ("two", 2)):
        file = world.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(tree(world, stage, 7, name)))
        done = gpt(stage, "-r", file, "--nproc", str(nproc), "-q", cwd=world.folder)
        assert done.code == 0, done.err
    ours, theirs = (without_the_unseen(weights(world, name)) for name in ("two", "one"))
    assert max((ours[n] - theirs[n]).abs().max().item() for n in theirs) < 1e-5
    for mine, other in zip(rows(world, "two"), rows(world, "one"), strict=True):
        for row in (mine, other):
            row.pop("clip_fraction", None)  # counts what lies beyond a border, which rounding crosses
        assert mine == pytest.approx(other, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["rlhf-ppo", "rlhf-grpo"])
def test_native_c_writes_what_the_policy_has_become(world: World, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads weights that change from rollout to rollout; stopped and resumed, it reads the same."""
    made = {name: tree(world, stage, 14, name) for name in ("by torch", "native", "parts")}
    train(made["native"])
    train({**made["parts"], "train": {**made["parts"]["train"], "max_steps": 8}})
    train(made["parts"], resume=world.folder / "parts")
    monkeypatch.setattr("gptcli.generate.native.library", lambda: None)
    train(made["by torch"])
    torchs, native, parts = (without_the_unseen(weights(world, name)) for name in made)
    assert max((native[n] - torchs[n]).abs().max().item() for n in torchs) < 1e-4
    assert all(torch.equal(parts[n], native[n]) for n in native)


def without_the_unseen(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A softmax does not see the keys' biases, nor a comparison the reward's: all of their gradient is rounding, of
    which Adam makes whole steps."""
    for name, tensor in tensors.items():
        if name.endswith("c_attn.bias"):
            tensor.view(3, -1)[1] = 0
        if name == "scalar_heads.reward.bias":
            tensor.zero_()
    return tensors


@pytest.mark.parametrize("stage", ["rlhf-reward", "rlhf-dpo"])
def test_pairs_are_not_compiled(world: World, stage: str) -> None:
    made = tree(world, stage, 2)
    made["train"]["compile"] = "auto"
    with pytest.raises(UserError, match=r"train\.compile: pairs differ in width"):
        train(made)


@pytest.mark.parametrize("stage", ["rlhf-reward", "rlhf-dpo"])
def test_an_epoch_is_a_pass_over_the_pairs(world: World, stage: str) -> None:
    made = tree(world, stage)
    made["train"] = {"epochs": 1.5, "global_batch_size": 8}
    made["data"]["val_fraction"] = 0
    pairs = len((world.folder / "pairs.jsonl").read_text().splitlines())
    assert train(made)["step"] == math.ceil(1.5 * pairs / 8)


def test_a_policy_that_does_not_learn_keeps_ratios_of_1(world: World) -> None:
    for stage, block in (("rlhf-ppo", "ppo"), ("rlhf-grpo", "grpo")):
        made = tree(world, stage, 12, stage)
        made["optim"] = {"lr": 1e-30, "schedule": "constant", "weight_decay": 0.0}
        made[block].pop("kl_target", None)
        train(made)
        for row in rows(world, stage):
            assert row["clip_fraction"] == 0
            assert abs(row.get("approx_kl", 0.0)) < 1e-9
            assert abs(row["kl"]) < 1e-6
            assert row["entropy"] >= 0


@pytest.mark.parametrize(("key", "value", "rollouts"), [("ppo_epochs", 1, 5), ("ppo_epochs", 4, 2),
                                                       ("rollout_batch_size", 8, 3)])  # fmt: skip
def test_resumed_with_other_sizes_it_begins_a_new_rollout(world: World, key: str, value: int, rollouts: int) -> None:
    made = tree(world, "rlhf-ppo", 5)  # in the last of three epochs
    made["optim"]["lr"] = 1e-4
    train(made)
    made["ppo"][key] = value
    made["train"] |= {"max_steps": 14}
    train(made, resume=world.folder / "run")
    entropies = [row["entropy"] for row in rows(world)]
    assert len(set(entropies[:5])) == 1
    assert len(set(entropies[5:])) == len(set(entropies)) - 1 == rollouts


def test_a_fixed_price_of_kl_is_what_the_recipe_says_when_resumed(world: World) -> None:
    made = tree(world, "rlhf-grpo", 6)
    train(made)
    made["grpo"] |= {"kl_coef": 0.9}
    made["train"] |= {"max_steps": 12}
    train(made, resume=world.folder / "run")
    assert [row["kl_coef"] for row in rows(world)] == [0.1] * 6 + [0.9] * 6


def test_what_a_reward_function_prints_is_no_output(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    (world.folder / "reward.py").write_text("print(1)\ndef score(p, r):\n    print(2)\n    return [0.0] * len(r)\n")
    train(tree(world, "rlhf-ppo", 1))
    assert capsys.readouterr() == ("", "1\n2\n")


@pytest.mark.parametrize("stage", STAGES)
def test_data_from_stdin(world: World, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tree(world, stage, 2, "file")
    train(made)
    (file,) = made["data"]["train"]
    made["data"], made["run"]["name"] = {"train": "-"}, "piped"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(Path(file).read_bytes())))
    train(made)
    ours, theirs = weights(world, "piped"), weights(world, "file")
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_preferences_in_a_folder_of_json(world: World) -> None:
    """Whatever the reader of examples takes."""
    made = tree(world, "rlhf-dpo", 2)
    (file,) = made["data"]["train"]
    folder = world.folder / "preferences"
    folder.mkdir()
    lines = Path(file).read_text().splitlines()
    (folder / "a.json").write_text(f"[{','.join(lines)}]")
    made["data"] = {"train": [str(folder)]}
    train(made)
    assert rows(world)[-1]["step"] == 2


def test_dropout_of_the_checkpoint_is_off(world: World) -> None:
    config = world.folder / "reference" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dropout": 0.5}))
    made = tree(world, "rlhf-ppo", 2)
    made["optim"]["lr"] = 1e-30
    train(made)
    assert all(abs(row["approx_kl"]) < 1e-9 for row in rows(world))
    assert open_model_dir(world.folder / "run" / "latest").config.dropout == 0


def test_what_ppo_logs(world: World) -> None:
    summary = train(tree(world, "rlhf-ppo"))
    logged = {"score", "reward", "kl", "kl_coef", "entropy", "response_length", "eos_rate", "clip_fraction"}
    assert logged | {"explained_variance", "value_loss", "policy_loss", "approx_kl"} <= rows(world)[-1].keys()
    assert rows(world)[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert summary["score"] == rows(world)[-1]["score"]


@pytest.mark.parametrize("stage", ["rlhf-reward", "rlhf-dpo"])
def test_held_out_figures_are_told_beside_what_length_alone_gets(
    world: World, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shorter answer is the better one, and so a baseline that took the longer one would be right in none."""
    lines = [{"prompt": "a", "chosen": "b", "rejected": "b" * n} for n in (2, 3) for _ in range(12)]
    (world.folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    made = tree(world, stage)
    made["data"] |= {"val_fraction": 0.25, "split": "tail"}
    recipe = build_recipe(made, where="test", stage=stage)
    summary = run_stage(recipe, Runtime(), RunConsole())
    assert {"val_loss", "val_accuracy"} <= summary.keys()
    assert summary["val_length_accuracy"] == 1
    said = capsys.readouterr().err
    assert "the shorter answer is the better one in 100%" in said
    assert re.search(r"held out \d\.\d+  accuracy \d\.\d+  length_accuracy 1\.0000", said)


def test_a_reward_model_tells_its_calibration(world: World) -> None:
    made = tree(world, "rlhf-reward")
    made["data"]["val_fraction"] = 0.3
    assert 0 <= train(made)["val_calibration_error"] <= 0.5
    histogram = json.loads((world.folder / "run" / "scores.json").read_text())
    assert len(histogram["edges"]) == len(histogram["better"]) + 1


# ---- bad input ------------------------------------------------------------------------------------------------

BAD_REWARDS = {
    "raise ValueError('no idea')": r"reward.py:score \(line \d+\) raised ValueError: no idea",
    "return [float('nan')] * len(responses)": r"returned nan for the response",
    "return [1.0]": r"returned 1 scores for 16 responses",
    "return 3": r"returned '3', not a list of numbers",
    "return dict.fromkeys(range(len(responses)), 1.0)": r"returned '\{0: 1.0.*, not a list of numbers",
    "raise SystemExit(0)": r"reward.py:score \(line \d+\) raised SystemExit: 0",
    "return ['x'] * len(responses)": r"not a list of numbers",
}


@pytest.mark.parametrize("bad", BAD_REWARDS, ids=range(len(BAD_REWARDS)))
def test_a_reward_that_fails_is_told_and_the_run_is_saved(world: World, bad: str) -> None:
    """It fails in the second rollout, after 6 steps."""
    (world.folder / "reward.py").write_text(
        f"calls = []\ndef score(prompts, responses):\n    calls.append(0)\n    if len(calls) == 2:\n        {bad}\n"
        "    return [0.0] * len(responses)\n"
    )
    with pytest.raises(UserError, match=BAD_REWARDS[bad]):
        train(tree(world, "rlhf-ppo", 12))
    assert (world.folder / "run" / "latest").resolve().name == "step-000006"
    train(
        tree(world, "rlhf-ppo", 12), resume=world.folder / "run"
    )  # the module is read anew, and does not fail at once
    assert (world.folder / "run" / "latest").resolve().name == "step-000012"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"init_from": None}, "init_from: (missing|give exactly one)|model, init_from"),
        ({"reward": {}}, "where do scores come from"),
        ({"reward": {"function": "reward.py"}}, "write it as FILE.py:NAME"),
        ({"reward": {"function": "nowhere.py:score"}}, "no such file"),
        ({"reward": {"function": "REWARD:other"}}, "has no function 'other'"),
        ({"reward": {"checkpoint": "REFERENCE"}}, "has no reward head"),
        ({"sampling": {"top_k": 3}}, "sampling.top_k: rollouts are drawn from the policy as it is"),
        ({"sampling": {"temperature": 0}}, "nothing is learned"),
        ({"sampling": {"max_new_tokens": 8}}, "prompts.jsonl:1: .*exceed the context of 8"),
        ({"ppo": {"rollout_batch_size": 12}}, "no multiple of the 8 rows"),
        ({"ppo": {"rollout_batch_size": 16, "minibatch_size": 4}}, "they are the same thing"),
        ({"ppo": {"rollout_batch_size": 16, "stop_token": "ab"}}, "is 2 tokens, and a stop is one"),
        ({"data": {"train": ["nowhere.jsonl"]}}, "no such file"),
        ({"data": {}}, "nothing to train on"),
    ],
)
def test_a_recipe_that_cannot_work_says_so(world: World, change: dict[str, Any], reason: str) -> None:
    made = {**tree(world, "rlhf-ppo", 2), **change}
    reward = made["reward"]
    for key, value in reward.items():
        value = value.replace("REWARD", str(world.folder / "reward.py")).replace("REFERENCE", made["init_from"] or "")
        reward[key] = value
    with pytest.raises(UserError, match=reason):
        train(made)


def test_preferences_without_preference_name_their_line(world: World) -> None:
    pairs = world.folder / "pairs.jsonl"
    same = {"prompt": "a", "chosen": "ab", "rejected": "ab"}
    pairs.write_text(json.dumps({**same, "rejected": "b"}) + "\n" + json.dumps(same) + "\n")
    for stage in ("rlhf-reward", "rlhf-dpo"):
        with pytest.raises(UserError, match=r"pairs.jsonl:2: chosen and rejected are the same text"):
            train(tree(world, stage))


# ---- from an adapter ------------------------------------------------------------------------------------------


def adapted(world: World) -> Path:
    """The reference with an adapter that does something, in a folder of its own."""
    base, lora = world.folder / "reference", LoraBlock(rank=2)
    model = world.reference
    add_lora(model, lora, 5)
    torch.manual_seed(0)
    for p in adapter_weights(model).values():
        p.data.normal_(std=0.1)
    folder = world.folder / "adapter"
    folder.mkdir()
    save_adapter(folder, model, lora, world.task.tokenizer, base=base)
    return folder


@pytest.mark.parametrize("stage", ["rlhf-dpo", "rlhf-grpo"])
def test_an_adapter_is_a_checkpoint_to_start_from(world: World, stage: str) -> None:
    start = {"init_from": str(adapted(world))}
    train({**tree(world, stage, 4, "whole"), **start})
    train({**tree(world, stage, 2, "parts"), **start})
    train({**tree(world, stage, 4, "parts"), **start}, resume=world.folder / "parts")
    ours, theirs = weights(world, "parts"), weights(world, "whole")
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


@pytest.mark.parametrize("part", ["adapter/adapter_model.safetensors", "reference/model.safetensors"])
def test_a_resume_notices_another_adapter_and_another_base(world: World, part: str) -> None:
    start = {"init_from": str(adapted(world))}
    train({**tree(world, "rlhf-dpo", 2), **start})
    file = world.folder / part
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(UserError, match="base or what gives rewards has changed since"):
        train({**tree(world, "rlhf-dpo", 4), **start}, resume=world.folder / "run")

"""`gpt plan`: figures for scripts, a table for people, one line for mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gptcli.cli.main import app
from gptcli.config.cluster import Job, fit
from gptcli.config.gpus import find_gpu
from gptcli.config.load import load_recipe
from gptcli.config.schema import ParallelSizes
from gptcli.errors import UserError
from tests.conftest import Tiny, gpt, make_tiny


def run(*arguments: str | Path) -> str:
    """What `gpt plan` prints, in this process; raises what it raises."""
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)], catch_exceptions=False)
    assert result.stderr == ""
    return result.stdout


def planned(*arguments: str | Path) -> dict[str, Any]:
    return json.loads(run("--json", *arguments))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    tiny = make_tiny(tmp_path_factory.mktemp("plan"), steps=1)
    tiny.train()
    return tiny


STEPS = [f"-s{key}" for key in ("train.max_steps=5", "train.epochs=null", "train.global_batch_size=4",
                                "train.micro_batch_size=4", "lora=null")]  # fmt: skip


def test_a_cluster_has_what_scripts_rely_on() -> None:
    row = planned("-r", "gpt3-175b.yaml", "--gpus", "1024", "--parallel", "dp=8,fsdp=32,tp=4", "--mfu", "0.5")
    assert row["fits"] is True
    assert row["nearest_layout"] is None
    assert sum(row["memory_per_gpu_bytes"].values()) == row["memory_per_gpu_total_bytes"] <= row["memory_usable_bytes"]
    assert {"weights", "gradients", "optimizer", "activations", "logits"} <= row["memory_per_gpu_bytes"].keys()
    assert row["parallel"] == {"dp": 8, "fsdp": 32, "tp": 4}
    assert row["days"] == pytest.approx(row["flops_per_token_with_attention"] * 300e9 / (1024 * 989e12 * 0.5) / 86400)
    assert row["gpu_days"] == pytest.approx(row["days"] * 1024)
    assert row["cost"] == pytest.approx(row["gpu_days"] * 24 * row["price_per_gpu_hour"])
    assert row["price_is_assumed"] is True
    assert row["pf_days"] == pytest.approx(3640, rel=5e-3)


def test_what_does_not_fit_comes_with_what_does() -> None:
    row = planned("-r", "gpt3-6.7b", "--gpus", "8", "--gpu", "a100", "--price", "2")
    near = row["nearest_layout"]
    assert row["fits"] is False
    assert (near["gpus"], near["dp"], near["fsdp"], near["tp"]) == (8, 4, 2, 1)
    assert near["memory_per_gpu_total_bytes"] <= row["memory_usable_bytes"] < row["memory_per_gpu_total_bytes"]
    assert row["cost"] == pytest.approx(row["gpu_days"] * 48)
    assert row["price_is_assumed"] is False
    layout = f"dp={near['dp']},fsdp={near['fsdp']},tp={near['tp']}"
    assert planned("-r", "gpt3-6.7b", "--gpus", "8", "--gpu", "a100", "--parallel", layout)["fits"] is True


def test_a_ramp_that_replicas_cannot_share_is_noted_with_its_remedy() -> None:
    arguments = ("-r", "gpt3-13b", "--gpus", "64", "--parallel", "fsdp")
    [note] = planned(*arguments)["notes"]
    assert "64 replicas cannot share 16 rows; -s train.batch_ramp.start=64" in note
    assert planned(*arguments, "-s", "train.batch_ramp.start=64")["notes"] == []


def test_people_get_a_table() -> None:
    done = gpt("plan", "-r", "gpt3-6.7b", "--gpus", "8")
    assert (done.code, done.err) == (0, "")
    for words in (
        "6,658,404,352 parameters",
        "each of 8 x h100, dp=8, bf16",
        "DOES NOT FIT",
        "nearest that fits: 8 x h100, dp=4 fsdp=2",
        "if 40% of the peak is reached (--mfu)",
        "an assumption: --price says yours",
    ):
        assert words in done.out
    assert max(map(len, done.out.splitlines())) <= 100
    assert "GPU-days" not in run("-r", "gpt3-6.7b")


def test_this_machine_is_planned_as_it_trains(tiny: Tiny) -> None:
    """--gpu cpu: the batch for CPUs, fp32, the trainer's own micro batch, and no guess about time."""
    import torch

    from gptcli.dist.runtime import Runtime
    from gptcli.stages.build import pick_plan

    changes = ("-s", "train.global_batch_size_cpu=4", "-s", "model.vocab_size=257")
    row = planned("-r", tiny.recipe, "--gpus", "1", "--gpu", "cpu", *changes)
    assert (row["precision"], row["micro_batch_size"], row["grad_accum_steps"]) == ("fp32", 4, 1)
    assert row["days"] is row["gpu_days"] is row["cost"] is None
    recipe = load_recipe("gpt2-small")
    assert recipe.model is not None
    plan = pick_plan(recipe, recipe.model, Runtime(), print, dtype=torch.float32)
    mine = fit(Job(recipe.model, recipe, find_gpu("cpu")), ParallelSizes())
    assert (plan.micro_batch_size, plan.grad_accum_steps) == (mine.micro_batch_size, mine.grad_accum_steps)


def test_a_checkpoint_says_its_shape(trained: Tiny) -> None:
    row = planned("-c", trained.run_dir)
    assert row["params"] == planned("-r", trained.recipe, "-s", "model.vocab_size=257")["params"]
    assert "tokens" not in row
    assert "parameters" in run("-c", trained.run_dir)


def test_a_comparison_is_two_texts(trained: Tiny) -> None:
    base = f"init_from={trained.run_dir}"
    alone, pairs = (
        json.loads(gpt("plan", "-r", verb, "-s", base, *STEPS, "--gpus", "1", "--json").out)
        for verb in ("sft", "rlhf-dpo")
    )
    assert pairs["tokens"] == 2 * alone["tokens"]
    assert pairs["memory_per_gpu_bytes"]["activations"] > alone["memory_per_gpu_bytes"]["activations"]


def test_a_recipe_that_starts_from_weights_is_planned_with_their_shape(trained: Tiny, tmp_path: Path) -> None:
    recipe = tmp_path / "more.yaml"
    recipe.write_text(f"init_from: {trained.run_dir}\ntrain: {{max_steps: 5, global_batch_size: 2}}\n")
    row = planned("-r", recipe, "--gpus", "1")
    assert row["params"] == planned("-c", trained.run_dir)["params"]
    assert (row["tokens"], row["fits"]) == (5 * 2 * 16, True)
    assert planned("-r", "gpt2-xl", "-c", trained.run_dir)["params"] == row["params"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "needs --recipe NAME|PATH"),
        (("-r", "gpt2-small", "--gpus", "8", "--parallel", "dp=3"), "its sizes multiply to 3, not to --gpus 8"),
        (("-r", "gpt2-small", "--gpus", "8", "--gpu", "h10"), "did you mean 'h100'?"),
        (("-r", "gpt2-xl", "--gpus", "2", "--parallel", "tp"), "does not divide 25 heads"),
        (("-c", "nowhere"), "no such checkpoint"),
        (("-c", "nowhere", "--gpus", "2"), "need a --recipe"),
        (("-r", "gpt1", "-s", "tokenizer=char", "-s", "model.vocab_size=null"), "-s model.vocab_size=N"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError) as caught:
        run(*arguments)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1

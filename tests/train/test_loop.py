"""The loop's arithmetic: however a batch is split, the same steps; everything random is derived."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from gptcli.errors import GptError
from tests.conftest import Tiny, gpt, make_tiny


def losses(tiny: Tiny, run: str = "tiny") -> list[float]:
    return [row["loss"] for row in tiny.metrics(run)]


@pytest.mark.parametrize("micro", [4, 1])
def test_micro_batches_do_not_change_the_losses(tiny: Tiny, micro: int) -> None:
    tiny.train("train.micro_batch_size=8", "run.name=whole")
    tiny.train(f"train.micro_batch_size={micro}", "run.name=split")
    assert losses(tiny, "split") == pytest.approx(losses(tiny, "whole"), abs=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_equal_one(tiny: Tiny, optimizer: str) -> None:
    sets = ["-s", f"optim.name={optimizer}", "-s", "train.micro_batch_size=2"]
    for name, nproc in (("one", 1), ("two", 2)):
        done = gpt("pretrain", "-r", tiny.recipe, "-s", f"run.name={name}", "--nproc", str(nproc), *sets, "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["step"] == 30
    assert losses(tiny, "two") == pytest.approx(losses(tiny, "one"), abs=1e-5)
    held_out = [[r["val_loss"] for r in tiny.metrics(run) if "val_loss" in r] for run in ("one", "two")]
    assert held_out[1] == pytest.approx(held_out[0], abs=1e-5)


def test_a_processes_error_is_said_once_with_its_status(tiny: Tiny) -> None:
    done = gpt("pretrain", "-r", tiny.recipe, "--nproc", "3")
    assert done.code == 2
    assert done.err.count("8 rows cannot be shared by 3 processes") == 1


def test_validation_and_samples_never_change_the_training(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path, dropout=0.2)
    tiny.train("run.name=plain", "train.eval_every=0")
    tiny.train("run.name=watched", "train.eval_every=3", "train.sample_every=4")
    assert losses(tiny, "watched") == losses(tiny, "plain")
    samples = [json.loads(line) for line in (tmp_path / "runs/watched/samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [4, 8, 12, 16, 20, 24, 28]


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path, dropout=0.2)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        tiny.train(f"run.name={name}", f"run.seed={seed}")
    assert losses(tiny, "a") == losses(tiny, "b")
    assert losses(tiny, "a") != losses(tiny, "c")


def test_training_learns_and_reports(tiny: Tiny) -> None:
    summary = tiny.train("train.max_steps=150")
    rows = tiny.metrics()
    assert rows[0]["loss"] == pytest.approx(math.log(257), rel=0.02)
    assert rows[-1]["loss"] < 2.2
    assert summary["val_loss"] == rows[-1]["val_loss"] < 2.4
    assert [r["step"] for r in rows] == list(range(1, 151))
    assert rows[-1]["tokens"] == 150 * 8 * 16
    assert (tiny.run_dir / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert (tiny.run_dir / "best").resolve().name == f"step-{min(rows, key=lambda r: r.get('val_loss', 9))['step']:06d}"


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_one_batch_can_be_overfitted(tiny: Tiny, name: str) -> None:
    source = tiny.folder / "short.txt"
    source.write_text("abcdefghijklmnopqrstuvwxyz" * 2)
    tiny.train(f"data.source=[{source}]", "train.max_steps=120", "train.eval_every=0", f"optim.name={name}")
    assert losses(tiny)[-1] < 0.1


def test_a_surprising_first_loss_is_said(tiny: Tiny) -> None:
    done = gpt("pretrain", "-r", tiny.recipe, "-s", "model.init_std=2.0", "-s", "train.max_steps=2")
    assert "surprise: the first loss is" in done.err
    assert "surprise" not in gpt("pretrain", "-r", tiny.recipe, "-s", "run.name=b", "-s", "train.max_steps=2").err


def test_a_loss_that_is_no_number_ends_the_run(tiny: Tiny) -> None:
    done = gpt(
        "pretrain",
        "-r",
        tiny.recipe,
        "-s",
        "optim.lr=1e30",
        "-s",
        "optim.grad_clip=0",
        "-s",
        "optim.warmup_steps=0",
    )
    assert done.code == 1
    assert "the loss is" in done.err
    assert "Traceback" not in done.err


def test_weights_that_are_no_numbers_are_never_saved(tiny: Tiny) -> None:
    """Between two looks at the loss, or where none is taken."""
    with pytest.raises(GptError, match=r"step 2: there are weights that are no finite .*; no checkpoint was saved"):
        tiny.train(
            "optim.lr=1e30", "optim.grad_clip=0", "optim.warmup_steps=0", "train.log_every=0", "train.save_every=2"
        )
    assert not list(tiny.folder.rglob("step-*"))


def test_samples_after_the_checkpoint_are_cut_by_a_resume(tiny: Tiny) -> None:
    sampled = ("train.sample_every=1", "train.save_every=2", "train.keep_last=9")
    tiny.train(*sampled, "train.max_steps=4")
    tiny.train(*sampled, "train.max_steps=5", resume=tiny.folder / "runs/tiny/step-000002")
    lines = (tiny.folder / "runs/tiny/samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]


def test_init_from_starts_from_the_weights_alone(tiny: Tiny) -> None:
    tiny.train()
    tree = tiny.recipe.read_text().replace("model: {", f"init_from: {tiny.run_dir}\nxmodel: {{")
    lines = [line for line in tree.splitlines() if not line.startswith(("xmodel", "tokenizer"))]
    tiny.recipe.write_text("\n".join(lines))
    tiny.train("run.name=further", "train.max_steps=1", "optim.warmup_steps=0", "optim.lr=1e-9")
    before, after = tiny.weights(), tiny.weights("further")
    for name in before:
        torch.testing.assert_close(before[name], after[name], atol=1e-6, rtol=0)
    assert losses(tiny, "further")[0] < losses(tiny)[0] - 0.5


def test_tensorboard_is_written_when_asked(tiny: Tiny) -> None:
    pytest.importorskip("tensorboard")
    tiny.train("train.loggers=[tensorboard]", "train.max_steps=3")
    assert list((tiny.run_dir / "tensorboard").glob("events.*"))

"""Stopping loses nothing, a kill no more than what came after the last save; a resume is exact to the bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gptcli import files
from gptcli.errors import GptError, UserError
from tests.conftest import Tiny, gpt, make_tiny

STEPS = 240


def start(tiny: Tiny, *arguments: str, **popen: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "gptcli", "pretrain", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tiny.folder,
        **popen,
    )


def first_or_resumed(tiny: Tiny) -> list[str]:
    return ["--resume", "runs/tiny"] if (tiny.run_dir / "latest").exists() else ["-r", str(tiny.recipe)]


def wait_for(condition, process: subprocess.Popen, seconds: float = 60) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        if condition():
            return True
        time.sleep(0.002)
    return False


def assert_same_run(tiny: Tiny, expected: Tiny) -> None:
    assert tiny.metrics() == expected.metrics()
    ours, theirs = tiny.weights(), expected.weights()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def kill_and_resume(tmp_path: Path, kills: int, *overrides: str) -> None:
    """Kill -9 at random steps, every third time in the middle of a save, then compare with a run left alone."""
    expected = make_tiny(tmp_path / "left-alone", steps=STEPS, dropout=0.1)
    expected.train(*overrides)
    tiny, draw = make_tiny(tmp_path / "killed", steps=STEPS, dropout=0.1), random.Random(0)
    killed_while_saving = 0
    for number in range(kills):
        sets = [part for o in overrides for part in ("-s", o)] if not (tiny.run_dir / "latest").exists() else []
        if not (tiny.run_dir / "latest").exists():
            shutil.rmtree(tiny.run_dir, ignore_errors=True)
        process = start(tiny, *first_or_resumed(tiny), *sets)
        seen = len(rows(tiny))
        if number % 3 == 2:
            wait_for(lambda: any(tiny.run_dir.glob(".step-*.tmp")), process)
            killed_while_saving += 1
        else:
            wanted = seen + draw.randint(1, STEPS // kills)
            wait_for(lambda wanted=wanted: len(rows(tiny)) >= wanted, process)
        process.kill()
        process.communicate()
    assert killed_while_saving == kills // 3
    done = gpt("pretrain", *first_or_resumed(tiny), cwd=tiny.folder)
    assert done.code == 0, done.err
    assert_same_run(tiny, expected)
    assert not list(tiny.run_dir.glob(".step-*"))


def rows(tiny: Tiny) -> list[str]:
    file = tiny.run_dir / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path) -> None:
    for name in ("left-alone", "killed"):
        (tmp_path / name).mkdir()


def test_killed_three_times_and_resumed_equals_left_alone(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [(), ("optim.name=muon", "train.micro_batch_size=3", "train.global_batch_size=9", "train.save_every=7")],
)
def test_killed_ten_times_and_resumed_equals_left_alone(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    kill_and_resume(tmp_path, 10, *overrides)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("nproc", [1, 2])
def test_a_signal_finishes_the_step_and_saves_it(tmp_path: Path, signum: int, status: int, nproc: int) -> None:
    tiny = make_tiny(tmp_path, steps=100_000)
    process = start(tiny, "-r", str(tiny.recipe), "-s", "train.save_every=0", "--nproc", str(nproc))
    assert wait_for(lambda: len(rows(tiny)) > 20, process)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err.decode()
    last = tiny.metrics()[-1]["step"]
    assert (tiny.run_dir / "latest").resolve().name == f"step-{last:06d}"
    assert f"stopped after step {last}" in err.decode()
    more = gpt("pretrain", "--resume", "runs/tiny", "-s", f"train.max_steps={last + 3}", cwd=tmp_path)
    assert more.code == 0, more.err
    assert [r["step"] for r in tiny.metrics()] == list(range(1, last + 4))


def test_an_existing_run_is_refused(tiny: Tiny) -> None:
    tiny.train("train.max_steps=2")
    before = tiny.metrics()
    with pytest.raises(UserError, match="this run exists; go on with --resume"):
        tiny.train()
    assert tiny.metrics() == before


def test_resume_refuses_other_data(tiny: Tiny) -> None:
    tiny.train("train.max_steps=2")
    (tiny.folder / "text.txt").write_text("other text " * 200)
    with pytest.raises(UserError, match="the data has changed"):
        tiny.train("train.max_steps=4", resume=tiny.run_dir)


def test_a_finished_run_resumed_does_nothing(tiny: Tiny) -> None:
    tiny.train()
    before, weights = tiny.metrics(), tiny.weights()
    tiny.train(resume=tiny.run_dir)
    assert tiny.metrics() == before
    assert all(torch.equal(weights[n], t) for n, t in tiny.weights().items())


def test_resume_from_an_earlier_checkpoint_of_the_run(tiny: Tiny) -> None:
    tiny.train()
    before, weights = tiny.metrics(), tiny.weights()
    tiny.train(resume=tiny.run_dir / "step-000010")
    assert tiny.metrics() == before
    assert all(torch.equal(weights[n], t) for n, t in tiny.weights().items())


@pytest.mark.parametrize(
    "file", ["model.safetensors", "training/optimizer.safetensors", "training/state.json", "config.json"]
)
def test_a_truncated_checkpoint_is_refused(tiny: Tiny, file: str) -> None:
    tiny.train("train.max_steps=3")
    path = tiny.run_dir / "latest" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{file}: damaged or cut short"):
        tiny.train("train.max_steps=6", resume=tiny.run_dir)


def test_a_full_disk_leaves_the_last_checkpoint(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = files.sync_tree, []

    def full(folder: Path) -> None:
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        original(folder)

    monkeypatch.setattr(files, "sync_tree", full)
    with pytest.raises(
        GptError, match=r"cannot save .No space left on device.; the last checkpoint is .*step-000010"
    ) as caught:
        tiny.train()
    assert caught.value.exit_code == 1
    monkeypatch.undo()
    assert not list(tiny.run_dir.glob(".step-*"))
    tiny.train(resume=tiny.run_dir)
    assert tiny.metrics()[-1]["step"] == 30


def left(tiny: Tiny) -> set[str]:
    return {p.name for p in tiny.run_dir.glob("step-*")}


def test_latest_best_and_every_nth_checkpoint_are_kept(tiny: Tiny) -> None:
    tiny.train("train.max_steps=31", "train.eval_every=4", "train.save_every=10")
    pointed = {(tiny.run_dir / link).resolve().name for link in ("latest", "best")}
    assert left(tiny) == pointed | {"step-000010", "step-000020", "step-000030"}
    rows = [r for r in tiny.metrics() if "val_loss" in r]
    best = min(rows, key=lambda r: r["val_loss"])["step"]
    assert (tiny.run_dir / "best").resolve().name == f"step-{best:06d}"


def test_keep_last_prunes_but_never_the_best(tiny: Tiny) -> None:
    tiny.train("train.keep_last=2", "train.max_steps=60", "train.eval_every=60", "train.save_every=10")
    assert left(tiny) == {"step-000050", "step-000060"}

"""Stopping loses nothing, a kill no more than what came after the last save; a resume is exact to the bit."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from gptcli import files
from gptcli.errors import GptError, UserError
from gptcli.train.stop import stop_signals
from tests.conftest import Tiny, gpt, make_tiny
from tests.kill import kill_and_resume, rows, start, wait_for


def make(folder: Path) -> Tiny:
    return make_tiny(folder, steps=240, dropout=0.1)


def test_killed_three_times_and_resumed_equals_left_alone(tmp_path: Path) -> None:
    kill_and_resume(make, tmp_path, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [(), ("optim.name=muon", "train.micro_batch_size=3", "train.global_batch_size=9", "train.save_every=7")],
)
def test_killed_ten_times_and_resumed_equals_left_alone(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    kill_and_resume(make, tmp_path, 10, *overrides)


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


def test_a_closed_terminal_stops_a_run_but_not_under_nohup() -> None:
    assert signal.SIGHUP in stop_signals()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert stop_signals() == [signal.SIGINT, signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before)


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

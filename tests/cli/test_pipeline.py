"""gpt generate -i FILE -o FILE, as a process: pipes, kills, signals and mistakes."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptcli.cli.main import main
from gptcli.errors import GptError
from gptcli.generate.rowfile import RowFile
from tests.conftest import gpt, make_tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ./runs/tiny and 60 prompts in it."""
    tiny = make_tiny(tmp_path_factory.mktemp("pipeline"), steps=10)
    tiny.train()
    lines = ({"id": f"q{i}", "prompt": f"line {i}", "max_new_tokens": 5 + 13 * (i % 9)} for i in range(60))
    (tiny.folder / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tiny.folder


def start(folder: Path, *arguments: str, **streams: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "gptcli", "generate", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        **streams,
    )


def wait_for_rows(out: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < count):
        time.sleep(0.005)


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(trained: Path) -> None:
    run = ("-i", "p.jsonl", "-q", "--batch-size", "8")
    assert gpt("generate", *run, "-o", "whole.jsonl", "--seed", "1", cwd=trained).code == 0
    expected, out, rng = (trained / "whole.jsonl").read_bytes(), trained / "killed.jsonl", random.Random(3)
    kills = 0
    for _ in range(4):
        process = start(trained, *run, "-o", out.name, "--seed", "1")
        have = out.read_bytes().count(b"\n") if out.exists() else 0
        wait_for_rows(out, have + rng.randrange(1, 14), process)
        time.sleep(rng.random() * 0.05)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        rows = out.read_bytes()
        assert expected.startswith(rows)
        with out.open("ab") as file:  # what a kill in the middle of a write leaves
            file.write(expected[len(rows) : len(rows) + rng.randrange(40)].split(b"\n")[0])
    assert kills
    done = gpt("generate", *run, "-o", out.name, "--seed", "1", "--json", cwd=trained)
    assert json.loads(done.out)["kept"] == rows.count(b"\n")
    assert out.read_bytes() == expected


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_what_is_done(trained: Path, signum: int, code: int) -> None:
    out = trained / f"stopped-{code}.jsonl"
    process = start(trained, "-i", "p.jsonl", "-o", out.name, "-q", "--batch-size", "2", "-n", "400")
    wait_for_rows(out, 3, process)
    process.send_signal(signum)
    assert process.wait(timeout=60) == code
    assert process.stderr is not None
    assert b"rows in stopped-" in process.stderr.read()
    rows = out.read_bytes()
    assert rows.endswith(b"\n")
    # the seed was drawn for the first call, and is kept for the next
    done = gpt("generate", "-i", "p.jsonl", "-o", out.name, "-q", "-n", "400", "--json", cwd=trained)
    assert json.loads(done.out) == {**json.loads(done.out), "rows": 60, "kept": rows.count(b"\n"), "bad": 0}
    assert out.read_bytes().startswith(rows)


@pytest.mark.parametrize("mistake", [("-i", "nowhere.jsonl"), ("-i", "bad.jsonl"), ("-i", "p.jsonl", "--regex", "((")])
def test_a_mistake_costs_no_row_and_leaves_no_file(trained: Path, mistake: tuple[str, ...]) -> None:
    (trained / "bad.jsonl").write_text("{\n")
    (trained / "kept.jsonl").write_text('{"id": 1}\n')
    assert gpt("generate", *mistake, "-o", "kept.jsonl", "--overwrite", cwd=trained).code == 2
    assert (trained / "kept.jsonl").read_text() == '{"id": 1}\n'
    assert gpt("generate", *mistake, "-o", "fresh.jsonl", cwd=trained).code == 2
    assert not list(trained.glob("fresh.jsonl*"))


def test_a_mistake_of_the_command_line_is_no_lines(trained: Path) -> None:
    done = gpt("generate", "-i", "p.jsonl", "--skip-bad", "--regex", "((", "-q", cwd=trained)
    assert done.code == 2
    assert done.err.startswith("gpt: regex: ")


def test_a_full_disk_names_the_file(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RowFile(trained / "full.jsonl", {}) as file:
        monkeypatch.setattr(RowFile, "_get_ready", full)
        with pytest.raises(GptError, match=r"full.jsonl: No space left on device; the same command goes on"):
            file.write(b"{}\n")
        monkeypatch.undo()


def test_a_signal_ends_the_wait_for_stdin(trained: Path) -> None:
    process = start(trained, "-i", "-", "-n", "2", "--batch-size", "1", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b'{"prompt": "x"}\n')
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["prompt"] == "x"  # answered before there is more to read
    process.terminate()
    assert process.wait(timeout=60) == 143


def test_stdin_to_stdout(trained: Path) -> None:
    lines = b"".join((trained / "p.jsonl").read_bytes().splitlines(keepends=True)[:5])
    ran = gpt("generate", "-i", "-", "--seed", "1", "--logprobs", "-q", cwd=trained, stdin=lines)
    assert (ran.code, ran.err) == (0, "")
    rows = [json.loads(line) for line in ran.out.splitlines()]
    assert [row["id"] for row in rows] == ["q0", "q1", "q2", "q3", "q4"]
    assert all(len(row["logprobs"]) == row["tokens"] == row["params"]["max_new_tokens"] for row in rows)
    plain = gpt("generate", "-i", "-", "-o", "-", "-n", "3", cwd=trained, stdin=b"one\ntwo\n")
    assert [json.loads(line)["prompt"] for line in plain.out.splitlines()] == ["one", "two"]
    assert gpt("generate", "-i", "-", "-o", "/dev/null", "-n", "3", cwd=trained, stdin=b"one\n").code == 0


def test_bad_lines_are_listed_and_counted(trained: Path) -> None:
    (trained / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n{"prompt": "b"}\nno\n')
    ran = gpt("generate", "-i", "bad.jsonl", "-n", "3", "--skip-bad", "-c", "runs/tiny", cwd=trained)
    assert [json.loads(line)["id"] for line in ran.out.splitlines()] == [1, 3]
    said = ran.err.splitlines()
    assert said[0] == "gpt: left out: bad.jsonl:2: prompt: expected text, not 3"
    assert said[1].startswith("gpt: left out: bad.jsonl:4: not JSON")
    assert said[2] == "gpt: 2 rows in stdout, 2 bad lines left out"
    ran = gpt("generate", "-i", "bad.jsonl", "-n", "3", "-c", "runs/tiny", cwd=trained)
    assert (ran.code, ran.err) == (2, "gpt: bad.jsonl:2: prompt: expected text, not 3\n")
    assert len(ran.out.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x", "-i", "p.jsonl"], "each line is a prompt"),
        (["-i", "p.jsonl", "--samples", "2"], "--samples"),
        (["-i", "p.jsonl", "--draft", "runs/tiny"], "--draft: speeds up one text"),
        (["-o", "out.jsonl"], "belong to -i"),
        (["-i", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["-i", "p.jsonl", "-o", "p.jsonl"], "is the input"),
        (["-i", "p.jsonl", "-o", "out.jsonl.gz"], "written plain"),
        (["-i", "p.jsonl", "-o", "text.txt"], "--overwrite begins anew"),
        (["-i", "p.jsonl", "--best-of", "2", "--num-return", "2"], "p.jsonl:1: num_return"),
    ],
)
def test_mistakes_are_one_line(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(trained)
    monkeypatch.setattr(sys, "argv", ["gpt", "generate", "-c", "runs/tiny", "-q", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capfd.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert words in said.err
    assert len(said.err.splitlines()) == 1

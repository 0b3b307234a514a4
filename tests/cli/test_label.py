"""gpt rlhf-label in a terminal, in a pipe, killed, resumed, with several checkpoints, functions and reward models."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gptcli.api import LoadedModel
from gptcli.cli.label_screen import Screen
from gptcli.cli.main import main
from gptcli.model import GPT
from gptcli.modeldir import open_model_dir, save_model
from gptcli.rlhf.label_rank import open_ranker
from gptcli.rlhf.labels import Question
from gptcli.rlhf.preferences import parse_preference
from tests.conftest import Finished, make_tiny

PROMPTS = [{"id": "a", "prompt": "line 1"}, {"id": "b", "prompt": "the square"}, {"prompt": "of 12"}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/tiny, runs/other (a checkpoint with a reward head) and prompts in it."""
    tiny = make_tiny(tmp_path_factory.mktemp("label"), steps=2)
    tiny.train()
    write(tiny.folder / "p.jsonl", *PROMPTS)
    folder = LoadedModel.open(tiny.run_dir, device="cpu")
    torch.manual_seed(1)
    config = replace(folder.config, context_length=64, scalar_heads={"reward": 1})
    (tiny.folder / "runs" / "other").mkdir()
    save_model(tiny.folder / "runs" / "other", config, dict(GPT(config).named_parameters()), folder.tokenizer)
    return tiny.folder


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


Gpt = Callable[..., Finished]


@pytest.fixture
def gpt(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Gpt:
    """The command line in this process, in the folder of `trained`."""

    def run(*arguments: str | Path, typed: str = "") -> Finished:
        monkeypatch.chdir(trained)
        monkeypatch.setattr(sys, "argv", ["gpt", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        with pytest.raises(SystemExit) as end:
            main()
        return Finished(int(str(end.value.code)), *capsys.readouterr())

    return run


@pytest.fixture
def label(gpt: Gpt) -> Gpt:
    def run(out: Path, typed: str, *more: str | Path) -> Finished:
        source = [] if "--responses" in more else ["--prompts", "p.jsonl", "-c", "runs/tiny", "-n", "5"]
        return gpt("rlhf-label", *source, "-o", out, "--labeller", "anna", *more, typed=typed)

    return run


def test_labels_say_who_when_and_where_from(label: Gpt, gpt: Gpt, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    done = label(out, "b a c d\na=b c d\n=\n\n", "-c", "runs/other", "-n", "12", "--json")
    assert done.json() == {
        "output": str(out),
        "labeller": "anna",
        "questions": 3,
        "labelled": 3,
        "skipped": 0,
        "left": 0,
        "without_choice": 0,
    }
    found = rows(out)
    assert [row["id"] for row in found] == ["a", "b", 3]
    assert [len(parse_preference(row).pairs) for row in found] == [6, 5, 0]
    for row in found:
        seeds = [(Path(s["checkpoint"]).parts[1], s["seed"]) for (s,) in row["sources"]]
        assert seeds == [("tiny", 0), ("tiny", 1), ("other", 2), ("other", 3)]
        assert sorted(row["shown"]) == [0, 1, 2, 3]
        assert "T" in row["time"]
    assert "runs" not in done.err  # blind
    first = found[0]
    assert first["ranking"] == [first["shown"][i] for i in (1, 0, 2, 3)]
    # what made an answer makes it again
    again = write(tmp_path / "again.jsonl", PROMPTS[0] | {"seed": 1, "max_new_tokens": 12})
    made = gpt("generate", "-i", again, "-c", trained / "runs/tiny")
    assert json.loads(made.out)["text"] == first["responses"][1]


def test_a_session_goes_on_with_the_same_answers(label: Gpt, tmp_path: Path) -> None:
    out, answers = tmp_path / "pairs.jsonl", tmp_path / "pairs.answers.jsonl"
    assert "1 of 3 labelled" in label(out, "a\nq\n").err
    before, kept = out.read_bytes(), answers.read_bytes()
    assert "2 of 3 labelled" in (done := label(out, "s\nb\n")).err
    assert "1 skipped; the same command goes on" in done.err
    assert out.read_bytes().startswith(before)
    assert answers.read_bytes() == kept
    assert [row["id"] for row in rows(out)] == ["a", 3]
    label(out, "a\n")  # the one that was skipped
    assert [row["id"] for row in rows(out)] == ["a", 3, "b"]
    whole = out.read_bytes()
    assert "no question is left" in label(out, "a\n").err
    assert out.read_bytes() == whole
    label(out, "u\nb\n")  # the last of an earlier session is taken back
    assert [row["id"] for row in rows(out)] == ["a", 3, "b"]
    refused = label(out, "", "--samples", "3")
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)
    assert "samples 2, now it is 3" in refused.err


def test_scores_and_a_second_labeller_of_the_same_answers(label: Gpt, gpt: Gpt, tmp_path: Path) -> None:
    anna, ben = tmp_path / "anna.jsonl", tmp_path / "ben.jsonl"
    label(anna, "71\n9 9\n1 7\n\n44\n", "--scale", "1-7")
    assert [sorted(row["scores"]) for row in rows(anna)] == [[1, 7], [1, 7], [4, 4]]
    assert [p.margin for p in parse_preference(rows(anna)[0]).pairs] == [6]
    done = label(ben, "a\na\na\n", "--responses", str(anna), "--labeller", "ben")
    assert "3 of 3 labelled by ben" in done.err
    assert [row["sources"] for row in rows(ben)] == [row["sources"] for row in rows(anna)]
    found = gpt("rlhf-label", "--agreement", anna, ben, "--json").json()["agreement"]
    # shown in the same order: anna chose a, then b, then neither; ben a each time
    assert found == [{"a": "anna", "b": "ben", "prompts": 3, "pairs": 3, "equal": pytest.approx(1 / 3)} | found[0]]
    assert found[0]["kappa"] == pytest.approx((1 / 3 - 1 / 3) / (1 - 1 / 3), abs=1e-9)
    assert "33.3% of 3 pairs" in gpt("rlhf-label", "--agreement", anna, ben).out


def test_a_function_ranks(gpt: Gpt, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text("def by_length(prompts, responses):\n    return [len(r) for r in responses]\n")
    given = {"prompt": "p", "responses": ["xx", "xxx", "yy"]}
    source, out = (
        write(tmp_path / "r.jsonl", given, {"prompt": "q", "responses": ["same", "same"]}),
        tmp_path / "o.jsonl",
    )
    spec = f"{tmp_path}/rank.py:by_length"
    done = gpt("rlhf-label", "--responses", source, "-o", out, "--rank-by", spec)
    assert "1 of 1 labelled" in done.err
    assert "1 prompts had fewer than two different answers" in done.err
    (row,) = rows(out)
    assert (row["ranking"], row["rewards"], row["labeller"]) == ([1, [0, 2]], [2, 3, 2], spec)
    gpt("rlhf-label", "--responses", source, "-o", out, "--rank-by", spec)
    assert rows(out) == [row]


def test_a_reward_model_ranks_as_it_scores(label: Gpt, trained: Path, tmp_path: Path) -> None:
    out, spec = tmp_path / "o.jsonl", f"reward:{trained}/runs/other"
    done = label(out, "", "--rank-by", spec, "--samples", "4")
    assert done.code == 0, done.err
    ranker, sample = open_ranker(spec, torch.device("cpu"), torch.float32)
    for row in rows(out):
        question = Question(0, row["prompt"], row["responses"])
        scores = ranker([sample(question, response) for response in row["responses"]]).tolist()
        assert scores == pytest.approx(row["rewards"], abs=1e-5)
        assert [scores[place] for place in row["ranking"]] == sorted(scores, reverse=True)
    assert "no reward head" in label(out, "", "--rank-by", "reward:runs/tiny", "--overwrite").err


def test_a_reward_model_reads_a_conversation_as_in_its_training(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rm"
    shutil.copytree(trained / "runs/other", folder)
    tokenizer = open_model_dir(folder).require_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|endoftext|>{{ m.content }}{% endfor %}"
    tokenizer.save(folder)
    _, sample = open_ranker(f"reward:{folder}", torch.device("cpu"), torch.float32)
    messages = [{"role": "user", "content": "ab"}]
    made = sample(Question(0, "<|endoftext|>ab", ["x", "y"], messages=messages), "x")
    assert (list(made.prompt_ids), list(made.response_ids)) == ([256, *b"ab"], [*b"x"])


def complains(gpt: Gpt, arguments: list, *words: str) -> None:
    done = gpt("rlhf-label", *arguments)
    assert done.code == 2, done
    assert len(done.err.strip().splitlines()) == 1, done.err
    for word in words:
        assert word in done.err
    assert done.out == ""


def test_mistakes_are_one_line(gpt: Gpt, trained: Path, tmp_path: Path) -> None:
    out, source = tmp_path / "o.jsonl", write(tmp_path / "r.jsonl", {"prompt": "p", "responses": ["a"]})
    model = ["-c", "runs/tiny", "-o", out]
    complains(gpt, [], "--prompts FILE", "--responses FILE")
    complains(gpt, ["--prompts", "p.jsonl"], "-o FILE: missing")
    complains(gpt, ["--prompts", "p.jsonl", "-o", "x.jsonl.gz"], "x.jsonl.gz: labels are written plain")
    complains(gpt, ["--prompts", "p.jsonl", *model, "--samples", "1"], "leaves nothing to choose")
    complains(gpt, ["--prompts", "p.jsonl", *model, "--temperature", "0"], "would be the same")
    complains(gpt, ["--prompts", "p.jsonl", *model, "--scale", "7"], "--scale 7", "1-7")
    complains(gpt, ["--prompts", "p.jsonl", *model, "--samples", "17", "-n", "4", "-q"], "17 answers", "16")
    complains(gpt, ["--prompts", "none.jsonl", *model, "--overwrite"], "none.jsonl")
    write(trained / "twice.jsonl", PROMPTS[0], PROMPTS[0])
    complains(gpt, ["--prompts", "twice.jsonl", *model, "--overwrite"], "twice.jsonl:2: id 'a' is that of")
    complains(gpt, ["--responses", source, "-o", out], "r.jsonl:1: responses: expected a list of at least two")
    complains(gpt, ["--responses", source, "-o", "p.jsonl"], "p.jsonl:1: not a label")
    complains(gpt, ["--agreement"], "name the files")
    complains(gpt, ["p.jsonl"], "p.jsonl: files belong to --agreement")


# ---- in a terminal ----------------------------------------------------------------------------------------------


class Terminal:
    """The verb in a pseudo-terminal of its own."""

    def __init__(self, folder: Path, out: Path, columns: int) -> None:
        self.master, slave = pty.openpty()
        arguments = ["rlhf-label", "--responses", "r.jsonl", "-o", str(out), "--labeller", "anna"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gptcli", *arguments],
            cwd=folder,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "COLUMNS": str(columns), "LINES": "40", "TERM": "xterm", "NO_COLOR": "1"},
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""

    def until(self, words: str, seconds: float = 120) -> str:
        """What is shown up to `words`."""
        end = time.monotonic() + seconds
        while words not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.master], [], [], 1)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode("utf-8", "replace")
                except OSError:  # the process ended
                    assert words in self.seen, self.seen
        shown, _, self.seen = self.seen.partition(words)
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


def test_a_person_in_a_terminal_killed_and_back(tmp_path: Path) -> None:
    questions = [{"id": i, "prompt": f"prompt {i}", "responses": [f"good {i}", f"bad {i}"]} for i in range(3)]
    write(tmp_path / "r.jsonl", *questions)
    out = tmp_path / "pairs.jsonl"
    wide = Terminal(tmp_path, out, columns=100)
    shown = wide.until("ranking> ")
    assert "prompt 0" in shown
    assert any("good 0" in line and "bad 0" in line for line in shown.splitlines())  # side by side
    wide.type("a\n")
    assert "a > b" in wide.until("prompt 1")
    wide.until("ranking> ")
    wide.type("u\n")
    assert "1 of 3" in wide.until("prompt 0")
    wide.until("ranking> ")
    assert out.read_bytes() == b""
    wide.type("b\n")
    wide.until("prompt 1")
    wide.until("ranking> ")
    os.kill(wide.process.pid, signal.SIGKILL)
    wide.process.wait()
    assert [row["id"] for row in rows(out)] == [0]

    narrow = Terminal(tmp_path, out, columns=50)
    shown = narrow.until("ranking> ")
    assert "2 of 3" in shown
    assert not any("good 1" in line and "bad 1" in line for line in shown.splitlines())  # one under the other
    narrow.type("=\n")
    narrow.until("3 of 3")
    narrow.until("ranking> ")
    while narrow.process.poll() is None:  # the first may come before the prompt waits for a line
        os.kill(narrow.process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            narrow.process.wait(timeout=10)  # a second one would cut its leaving short
    assert narrow.process.returncode == 130
    assert [row["id"] for row in rows(out)] == [0, 1]


def test_an_answer_does_nothing_to_the_terminal() -> None:
    console = Console(width=60, record=True, file=io.StringIO(), markup=False)
    Screen(None, console=console).question("1 of 1", "[bold]p[/]", ["\x1b[2Jhidden \u202eback", "[red]\rx\x07"])
    shown = console.export_text()
    assert r"\x1b[2Jhidden \x202eback" in shown
    assert r"[red]\x0dx\x07" in shown
    assert "[bold]p[/]" in shown
    assert "\x1b" not in shown

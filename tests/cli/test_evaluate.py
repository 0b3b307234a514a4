"""gpt eval and gpt score as their users run them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptcli.eval.results import read_results
from tests.conftest import gpt, make_tiny

ROWS = [{"sentence_good": f"a{i}", "sentence_bad": f"b{i}"} for i in range(6)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ./runs/tiny and rows of a task in it."""
    tiny = make_tiny(tmp_path_factory.mktemp("trained"), steps=5)
    tiny.train()
    (tiny.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tiny.folder


def test_a_task_gives_one_object_and_a_file(trained: Path) -> None:
    row = gpt(
        "eval", "--task", "blimp", "--data", "rows.jsonl", "--limit", "5", "-o", "r.json", "--json", "-q", cwd=trained
    ).json()
    assert (row["task"], row["n"]) == ("blimp", 5)
    assert row["checkpoint"] == str(next((trained / "runs/tiny").glob("step-*")).relative_to(trained))
    assert {"acc", "stderr", "acc_stderr", "tokenizer", "prompt_hash", "settings"} <= row.keys()
    assert "items" not in row
    (result,) = read_results(trained / "r.json")
    assert result.metrics["acc"] == row["acc"]
    assert result.settings["limit"] == 5
    assert [item["id"] for item in result.items] == list("01234")


def test_several_tasks_and_the_table(trained: Path) -> None:
    arguments = ("eval", "--task", "blimp,perplexity", "--data", "blimp=rows.jsonl", "--data", "perplexity=text.txt")
    rows = gpt(*arguments, "--json", "-q", cwd=trained).json()["results"]
    assert [row["task"] for row in rows] == ["blimp", "perplexity"]
    shown = gpt(*arguments, "-q", cwd=trained).out
    assert "acc_norm" in shown
    assert "bits per byte" in shown
    listed = gpt("eval", "--list").out
    assert all(name in listed for name in ("hellaswag", "cbt_ne", "gsm8k", "37.37", "query, choices, gold"))


def test_the_cost_of_int8_is_measured_before_anything_is_packed(trained: Path) -> None:
    arguments = ("--data", "blimp=rows.jsonl", "--data", "perplexity=text.txt", "--int8", "--json", "-q")
    alone = gpt("eval", "--task", "perplexity", *arguments[2:], cwd=trained).json()
    found = gpt("eval", "--task", "blimp,perplexity", *arguments, cwd=trained).json()["results"][1]
    assert found["int8_cost"] == pytest.approx(alone["int8_cost"])
    plain = gpt("eval", "--data", "text.txt", "--json", "-q", cwd=trained).json()
    assert found["perplexity_unpacked"] == pytest.approx(plain["perplexity"]) != found["perplexity"]


def test_results_never_take_the_place_of_what_is_read(trained: Path) -> None:
    rows = (trained / "rows.jsonl").read_bytes()
    for spec in ("rows.jsonl", "blimp=rows.jsonl", "./rows.jsonl"):
        done = gpt("eval", "--task", "blimp", "--data", spec, "-o", "rows.jsonl", "-q", cwd=trained)
        assert (done.code, "is what is read" in done.err) == (2, True)
    assert gpt("eval", "--task", "blimp", "--data", "rows.jsonl", "-o", "runs", cwd=trained).err.endswith(
        "name a file\n"
    )
    assert (trained / "rows.jsonl").read_bytes() == rows


def test_options_that_say_nothing_are_refused(trained: Path) -> None:
    for arguments, words in (
        (("--data", "text.txt", "--num-fewshot", "3"), "--num-fewshot: has no meaning with --task perplexity"),
        (("--data", "text.txt", "--instruction", "x"), "--instruction: has no meaning with --task perplexity"),
        (("--task", "finetune", "--stride", "3"), "--stride: has no meaning with --task finetune"),
        (("--task", "blimp", "--include", "x"), "--include: is for --harness"),
    ):
        done = gpt("eval", *arguments, cwd=trained)
        assert (done.code, words in done.err) == (2, True), done.err


def test_the_list_as_one_object() -> None:
    (row,) = [t for t in gpt("eval", "--list", "--json").json()["tasks"] if t["name"] == "hellaswag"]
    assert row["kind"] == "choice"


def test_a_score_is_what_eval_says(trained: Path) -> None:
    text = "line 7: the square of 7 is 49, and then some é more.\n" * 3
    (trained / "s.txt").write_text(text)
    said = gpt("eval", "--data", "s.txt", "--json", "-q", cwd=trained).json()
    row = gpt("score", "-q", cwd=trained, stdin=text.encode()).json()
    assert row["nll"] == pytest.approx(said["nll"], rel=1e-6)
    assert row["bits_per_byte"] == pytest.approx(said["bits_per_byte"])
    assert row["perplexity"] == pytest.approx(said["perplexity"])
    assert len(row["tokens"]) == said["tokens"]
    assert "".join(token["text"] for token in row["tokens"]) == text
    assert -sum(token["logprob"] for token in row["tokens"]) == pytest.approx(row["nll"])
    assert gpt("score", "ab", "--json", "-q", cwd=trained).json()["tokens"][0]["id"] == ord("a")


def test_a_terminal_gets_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptcli.api import TokenScore
    from gptcli.cli.score import shaded

    tokens = [TokenScore("a", 1, -0.1), TokenScore("b\n", 2, -9.0), TokenScore("c", 3, -3.0)]
    assert shaded(tokens) == "a\x1b[48;5;88mb\x1b[0m\n\x1b[48;5;88m\x1b[0m\x1b[48;5;58mc\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert shaded(tokens) == "ab\nc"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "--task", "piqa", "--data", "rows.jsonl"], "needs the columns goal, sol1, sol2, label"),
        (["eval", "--task", "pika"], "did you mean 'piqa'?"),
        (["eval", "--task", "mine.yaml"], "mine.yaml: no such file"),
        (["eval", "--task", "piqa", "--normalize", "x"], "expected one of none, chars"),
        (["eval", "--task", "blimp", "--data", "rows.jsonl", "-o", "no/r.json"], "the folder it should be in"),
        (["eval", "--task", "gsm8k", "--data", "rows.jsonl"], "needs the columns question, answer"),
        (["score", "--stride", "99", "abc"], "is more than the model's context"),
        (["score", " "], "nothing to score"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], words: str, trained: Path) -> None:
    done = gpt(*arguments, "-c", "runs/tiny", "-q", cwd=trained)
    assert done.code == 2
    assert words in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_the_harness_as_a_flag(trained: Path) -> None:
    pytest.importorskip("lm_eval")
    (trained / "theirs").mkdir()
    (trained / "theirs/mine.yaml").write_text(
        "task: mine\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text: ''\n"
        f"doc_to_target: 0\ndataset_kwargs: {{data_files: {{test: {trained}/rows.jsonl}}}}\n"
        'doc_to_choice: "{{[sentence_good, sentence_bad]}}"\nmetric_list: [{metric: acc}]\n'
    )
    row = gpt("eval", "--harness", "--task", "mine", "--include", "theirs", "--json", "-q", cwd=trained).json()
    ours = gpt("eval", "--task", "blimp", "--data", "rows.jsonl", "--json", "-q", cwd=trained).json()
    assert (row["task"], row["n"], row["acc"]) == ("mine", 6, ours["acc"])
    done = gpt("eval", "--harness", "--task", "mine", "--data", "rows.jsonl", "-q", cwd=trained)
    assert done.code == 2
    assert "leave out --data" in done.err

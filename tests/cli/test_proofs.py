"""`gpt compare`, `gpt inspect positions` and `gpt data contamination` as their users see them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from gptcli.eval.results import Aggregate, Result, write_results
from tests.conftest import Finished, Tiny, gpt, make_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    tiny = make_tiny(tmp_path_factory.mktemp("proofs"), steps=20)
    tiny.train()
    tiny.train("run.name=young", "train.max_steps=1")
    return tiny


def one_line(done: Finished, words: str) -> None:
    assert done.code == 2, done
    assert words in done.err
    assert len(done.err.splitlines()) == 1


def write_result(path: Path, right: list[int], **changes) -> Path:
    items = [{"id": str(i), "acc": float(i in right)} for i in range(10)]
    fields = {"task": "t", "prompt_hash": "p" * 64, "checkpoint": path.stem, "items": items, **changes}
    write_results(
        path,
        [Result(metrics={"acc": len(right) / 10}, n=10, tokenizer="h", aggregates={"acc": Aggregate("acc")}, **fields)],
    )
    return path


def test_compare_files(tmp_path: Path) -> None:
    a, b = write_result(tmp_path / "a.json", [0, 1]), write_result(tmp_path / "b.json", [0, 1, 2, 3])
    done = gpt("compare", a, b)
    assert done.code == 0, done.err
    assert re.search(r"B - A  \+0.2 \(95% interval .* to .*\), p = 0\.\d+", done.out)
    assert re.search(r"about \d+ more items", done.out)
    row = gpt("compare", a, b, "--json").json()
    assert row["difference"] == pytest.approx(0.2)
    assert {"low", "high", "p_value", "more_items", "n", "better"} <= row.keys()
    other = write_result(tmp_path / "c.json", [0], prompt_hash="q" * 64)
    one_line(gpt("compare", a, other), "not asked the same questions")
    one_line(gpt("compare", a, write_result(tmp_path / "d.json", [0], task="u")), "no task to compare on")
    one_line(gpt("compare", a, b, "--limit", "3"), "was measured already")


def test_compare_checkpoints(tiny: Tiny) -> None:
    text = tiny.folder / "lines"
    text.mkdir()
    for i in range(12):
        (text / f"{i}.txt").write_text(f"line {i}: the square of {i} is {i * i}.\n")
    young = tiny.run_dir.parent / "young"
    row = gpt("compare", young, tiny.run_dir, "--task", "perplexity", "--data", text, "--json").json()
    assert row["n"] == 12
    assert row["better"] == "B"
    assert row["high"] < 0  # a perplexity, so less is better
    assert row["value_b"] - row["value_a"] == pytest.approx(row["difference"])
    one_line(gpt("compare", young, tiny.run_dir), "say with --task")
    (text / "rows.jsonl").write_text("".join(json.dumps({"q": f"line {i}:", "a": f" {i}"}) + "\n" for i in range(3)))
    task = text / "file.yaml"  # which says another name
    task.write_text("name: my-quiz\nkind: word\ndata: rows.jsonl\ncontext: '{q}'\ntarget: '{a}'\n")
    row = gpt("compare", young, tiny.run_dir, "--task", task, "--json").json()
    assert (row["task"], row["n"]) == ("my-quiz", 3)


def test_positions(tiny: Tiny, tmp_path: Path) -> None:
    done = gpt("inspect", "positions", "-c", tiny.run_dir)
    assert done.code == 0, done.err
    assert [line.split()[0] for line in done.out.splitlines()[:-1]] == ["0", "1", "2-3", "4-7", "8-15"]
    done = gpt("inspect", "positions", "-c", tiny.run_dir, "--data", tiny.folder / "text.txt", "-o", tmp_path / "x.png")
    assert done.out == f"{tmp_path / 'x.png'}\n"
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    row = gpt("inspect", "positions", "-c", tiny.run_dir, "--length", "32", "--extend", "--json").json()
    assert len(row["loss"]) == 32
    assert row["spans"][-1]["first"] == 16 == row["context_length"]
    one_line(gpt("inspect", "positions", "-c", tiny.run_dir, "--length", "32"), "--extend repeats them")
    one_line(gpt("inspect", "positions", "-c", tiny.run_dir, "-o", "x.pdf"), "ends in .png")


def test_contamination(tmp_path: Path) -> None:
    texts = [f"item {i}: " + " ".join(f"word{i}x{j}" for j in range(14)) for i in range(10)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps({"query": text}) + "\n" for text in texts))
    (tmp_path / "corpus.txt").write_text(f"Before.\n{texts[3].upper()}!\nAfter.\n")
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": texts[7]}) + "\n")
    result = write_result(tmp_path / "r.json", [3, 7, 8])
    corpus = [tmp_path / "corpus.txt", tmp_path / "corpus.jsonl"]
    items = ["--items", tmp_path / "items.jsonl"]
    row = gpt("data", "contamination", *corpus, *items, "--results", result, "--json").json()
    assert [match["id"] for match in row["flagged"]] == ["3", "7"]
    assert row["ngram"] == 13
    (score,) = row["scores"]
    assert (score["all"], score["clean"], score["flagged"]) == (0.3, 0.125, 1.0)
    done = gpt("data", "contamination", *corpus, *items, "--results", result)
    assert done.out.startswith("2 of 10 items (20.0%) share 13 words in a row")
    assert "corpus.jsonl" in done.out
    assert re.search(r"0\.125 ± \S+  n=8", done.out)

    one_line(gpt("data", "contamination", tmp_path / "nowhere.txt", *items), "no such file")
    one_line(gpt("data", "contamination", *corpus, "--items", tmp_path / "corpus.txt"), "not JSON")
    stranger = write_result(tmp_path / "s.json", [0], items=[{"id": "99", "acc": 1.0}])
    one_line(gpt("data", "contamination", *corpus, *items, "--results", stranger), "item '99'")

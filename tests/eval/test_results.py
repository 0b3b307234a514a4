"""Results survive their file, and their standard errors are the textbook's."""

from __future__ import annotations

import json
import math
import statistics

import pytest

from gptcli.errors import UserError
from gptcli.eval.results import Aggregate, Result, read_results, results_tree, write_results

ITEMS = [{"id": str(i), "acc": float(i % 3 == 0), "nll": 2.0 + i, "tokens": 3 + i % 2} for i in range(10)]


def make(**changes) -> Result:
    acc = Aggregate("acc")
    fields = {
        "task": "t", "metrics": {"acc": 0.4, "acc_norm": 0.5}, "n": 10, "checkpoint": "c", "tokenizer": "h",
        "prompt_hash": "p", "stderr": {"acc": 0.1}, "aggregates": {"acc": acc}, "settings": {"seed": 0}, "items": ITEMS,
    }  # fmt: skip
    return Result(**{**fields, **changes})


@pytest.mark.parametrize("results", [[make()], [make(), make(task="u", groups={"g": {"acc": 1.0, "n": 3}}, items=[])]])
def test_the_file_gives_back_what_was_written(results, tmp_path) -> None:
    write_results(tmp_path / "r.json", results)
    assert read_results(tmp_path / "r.json") == results


def test_the_fields_that_scripts_rely_on() -> None:
    tree = results_tree([make()], items=False)
    assert {k: tree[k] for k in ("task", "acc", "stderr", "acc_stderr", "n", "checkpoint", "tokenizer")} == {
        "task": "t", "acc": 0.4, "stderr": 0.1, "acc_stderr": 0.1, "n": 10, "checkpoint": "c", "tokenizer": "h",
    }  # fmt: skip
    assert "items" not in tree
    assert make().main == "acc"
    assert [r["task"] for r in results_tree([make(), make()], items=True)["results"]] == ["t", "t"]


def test_a_mean_has_the_standard_error_of_the_mean() -> None:
    values = [item["acc"] for item in ITEMS]
    found = Aggregate("acc")(ITEMS)
    assert found.value == pytest.approx(statistics.mean(values))
    assert found.stderr == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)))
    assert Aggregate("acc")(ITEMS[:1]) == (1.0, None)


def test_a_perplexity_is_over_its_tokens_and_its_error_that_of_many_samples() -> None:
    import random

    perplexity = Aggregate("nll", over="tokens", then="exp")
    assert perplexity(ITEMS).value == pytest.approx(math.exp(sum(i["nll"] for i in ITEMS) / 35))
    draw = random.Random(0)

    def sample() -> list[dict]:
        tokens = [draw.randint(50, 150) for _ in range(200)]
        return [{"nll": t * draw.gauss(2.0, 0.3), "tokens": t} for t in tokens]

    spread = statistics.stdev(perplexity(sample()).value for _ in range(400))
    assert perplexity(sample()).stderr == pytest.approx(spread, rel=0.25)
    assert Aggregate("nll", "tokens", "exp")([{"nll": 1e9, "tokens": 1}]).value > 1e300


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("{}", "not a file of `gpt eval -o"),
        ('{"format": "gptcli-eval", "format_version": 9}', "format_version 9"),
        ('{"format": "gptcli-eval", "format_version": 1, "task": "x"}', "damaged"),
    ],
)
def test_other_files_are_refused(text, words, tmp_path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        read_results(tmp_path / "r.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="No such file"):
        read_results(tmp_path / "none.json")
    assert json.loads(json.dumps(results_tree([make()], items=True)))["settings"] == {"seed": 0}

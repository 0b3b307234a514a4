"""Only answers to the same questions are compared, item by item."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from gptcli.errors import UserError
from gptcli.eval.compare import compare_results, comparison_lines, lower_is_better, paired_items
from gptcli.eval.results import Aggregate, Result


def make(skill: float, *, name: str, n: int = 200, **changes) -> Result:
    draw = random.Random(name)
    items = [
        {"id": str(i), "acc": float(draw.random() < skill), "nll": (3 - skill) * (5 + i % 3), "tokens": 5 + i % 3}
        for i in range(n)
    ]
    aggregates = {"acc": Aggregate("acc"), "perplexity": Aggregate("nll", "tokens", "exp")}
    metrics = {metric: how(items).value for metric, how in aggregates.items()} | {"bleu": 20.0}
    return Result("t", metrics, n, name, "h", "p" * 64, aggregates=aggregates, items=items, **changes)


def test_a_better_model_is_better_on_either_scale() -> None:
    a, b = make(0.4, name="weak"), make(0.8, name="strong")
    row = compare_results(a, b)
    assert (row["metric"], row["better"], row["more_items"], row["n"]) == ("acc", "B", 0, 200)
    assert row["difference"] == pytest.approx(b.metrics["acc"] - a.metrics["acc"])
    assert comparison_lines(row)[-1] == "B is better"
    row = compare_results(a, b, metric="perplexity")
    assert row["better"] == "B"
    assert row["difference"] == pytest.approx(math.exp(2.2) - math.exp(2.6))
    assert row["low"] <= row["difference"] <= row["high"] < 0


def test_chance_says_how_many_more_items() -> None:
    row = compare_results(make(0.5, name="x", n=40), make(0.5, name="y", n=40))
    assert row["better"] is None
    assert row["more_items"] > 0
    assert f"{row['more_items']:,} more items" in comparison_lines(row)[-1]
    same = make(0.5, name="x")
    assert comparison_lines(compare_results(same, same))[-1] == "no difference to be seen"


def test_items_are_paired_by_id() -> None:
    a, b = make(0.4, name="a"), make(0.8, name="b")
    shuffled = dataclasses.replace(b, items=random.Random(0).sample(b.items, len(b.items)))
    assert paired_items(a, shuffled) == (a.items, b.items)
    assert compare_results(a, shuffled) == compare_results(a, b)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt_hash": "q" * 64, "settings": {"num_fewshot": 5}}, r"the same .*\(they differ in num_fewshot"),
        ({"prompt_hash": "q" * 64}, "not asked the same questions: prompt hash ppp"),
        ({"task": "u"}, "measured on t, b on u"),
        ({"items": []}, "0 items in this result"),
        ({"items": make(0.1, name="c").items[:-1]}, "different items"),
        ({"items": make(0.1, name="c").items[1:] * 2}, "different items"),
        ({"metrics": {"acc_norm": 1.0}}, "no metric 'acc'; it has acc_norm"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes, words) -> None:
    with pytest.raises(UserError, match=words) as caught:
        compare_results(make(0.4, name="a"), dataclasses.replace(make(0.8, name="b"), **changes))
    assert "\n" not in str(caught.value)


def test_a_figure_of_the_corpus_has_no_interval() -> None:
    with pytest.raises(UserError, match="whole corpus"):
        compare_results(make(0.4, name="a"), make(0.8, name="b"), metric="bleu")


def test_directions() -> None:
    assert [lower_is_better(m) for m in ("acc", "perplexity", "word_perplexity", "bits_per_byte", "rouge1")] == [
        False, True, True, True, False,
    ]  # fmt: skip

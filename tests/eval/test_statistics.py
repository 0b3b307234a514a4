"""Standard errors, the paired bootstrap's calibration, and how many items a difference needs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gptcli.eval import statistics as ours
from gptcli.eval.statistics import Ratio, more_items, paired_bootstrap

ALPHA, SIMULATIONS = 0.05, 800


def mean_of(values: np.ndarray) -> Ratio:
    return Ratio(np.asarray(values, np.float64), np.ones(len(values)))


def accepted(rate: float, n: int) -> tuple[float, float]:
    """The 99% binomial interval around a rate."""
    margin = 2.576 * math.sqrt(rate * (1 - rate) / n)
    return rate - margin, rate + margin


def null_accuracies(draw: np.random.Generator, n: int) -> tuple[Ratio, Ratio]:
    """Two models of equal skill: the easier an item, the more often each has it right."""
    ease = draw.uniform(0.1, 0.9, n)
    return mean_of(draw.random(n) < ease), mean_of(draw.random(n) < ease)


def null_perplexities(draw: np.random.Generator, n: int) -> tuple[Ratio, Ratio]:
    tokens, hard = draw.integers(20, 200, n).astype(float), draw.gamma(4, 0.5, n)
    return tuple(Ratio(tokens * (hard + draw.normal(0, 0.2, n)), tokens, math.exp) for _ in "ab")  # type: ignore[return-value]


@pytest.mark.parametrize("null", [null_accuracies, null_perplexities])
def test_on_nulls_the_false_positive_rate_is_alpha(null) -> None:
    draw = np.random.default_rng(3)
    found = [paired_bootstrap(*null(draw, 120), seed=i, resamples=400) for i in range(SIMULATIONS)]
    low, high = accepted(ALPHA, SIMULATIONS)
    assert low <= np.mean([c.p_value < ALPHA for c in found]) <= high
    # the interval leaves out 0 exactly as often
    assert low <= np.mean([not c.low <= 0 <= c.high for c in found]) <= high


def test_the_p_values_of_nulls_are_uniform() -> None:
    draw = np.random.default_rng(4)
    p = [paired_bootstrap(*null_perplexities(draw, 150), seed=i, resamples=300).p_value for i in range(400)]
    for share in (0.1, 0.25, 0.5, 0.75):
        low, high = accepted(share, len(p))
        assert low <= np.mean(np.array(p) <= share) <= high


def test_a_real_difference_is_found_and_its_interval_holds_it() -> None:
    draw, hits = np.random.default_rng(5), 0
    for i in range(100):
        a = draw.normal(0, 1, 200)
        found = paired_bootstrap(mean_of(a), mean_of(a + 0.3 + draw.normal(0, 0.5, 200)), seed=i, resamples=500)
        assert found.p_value < 0.05
        assert found.more_items == 0
        hits += found.low <= 0.3 <= found.high
    assert hits >= 88


def test_the_order_of_items_and_the_seed_decide_all_and_pairing_helps() -> None:
    draw = np.random.default_rng(6)
    hard = draw.normal(0, 3, 100)
    a, b = mean_of(hard + draw.normal(0, 0.1, 100)), mean_of(hard + 0.1 + draw.normal(0, 0.1, 100))
    once = paired_bootstrap(a, b)
    assert once == paired_bootstrap(a, b)
    assert once != paired_bootstrap(a, b, seed=1)
    assert once.p_value < 0.001  # unpaired, the error would be thirty times the difference
    flipped = paired_bootstrap(b, a)
    assert flipped.difference == pytest.approx(-once.difference)
    assert (flipped.low, flipped.high) == (pytest.approx(-once.high), pytest.approx(-once.low))


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(7)
    a, b = null_accuracies(draw, 50)
    whole = paired_bootstrap(a, b, resamples=4000)
    monkeypatch.setattr(ours, "BLOCK", 500)
    pieces = paired_bootstrap(a, b, resamples=4000)
    assert pieces.p_value == pytest.approx(whole.p_value, abs=0.05)


def test_equal_models_are_equal() -> None:
    same = mean_of(np.array([0.0, 1.0, 1.0]))
    found = paired_bootstrap(same, same)
    assert (found.difference, found.low, found.high, found.p_value, found.more_items) == (0, 0, 0, 1, None)


def test_so_many_more_items_give_the_power_that_is_promised() -> None:
    draw, n, effect = np.random.default_rng(8), 60, 0.2
    more = more_items(effect, 1 / math.sqrt(n), n)
    assert more is not None
    assert n + more == pytest.approx((2.8 / effect) ** 2, rel=0.01)  # the textbook's, for one standard deviation
    found = [
        paired_bootstrap(mean_of(np.zeros(n + more)), mean_of(draw.normal(effect, 1, n + more)), seed=i, resamples=300)
        for i in range(300)
    ]
    assert np.mean([c.p_value < 0.05 for c in found]) == pytest.approx(0.8, abs=0.07)

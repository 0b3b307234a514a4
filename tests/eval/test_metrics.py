"""Metrics against hand-made cases, their definitions, and scikit-learn and scipy where these are there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcli.eval.metrics import accuracy, confusion_matrix, f1, f1_scores, matthews, pearson, ranks, spearman

classes = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=50)
numbers = st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=40)


def test_a_case_by_hand() -> None:
    confusion = confusion_matrix(predicted=[1, 1, 0, 0, 1], true=[1, 0, 0, 1, 1], n=2)
    assert confusion.tolist() == [[1, 1], [1, 2]]
    assert accuracy(confusion) == pytest.approx(0.6)
    assert f1(confusion) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    absent = confusion_matrix([0, 0, 1], [0, 1, 1], 4)  # two classes of four, as scikit-learn's macro average has it
    assert f1(absent) == pytest.approx(2 / 3)
    assert matthews(confusion) == pytest.approx((2 * 1 - 1 * 1) / np.sqrt(3 * 3 * 2 * 2))


def test_constant_predictions_correlate_with_nothing() -> None:
    assert matthews(confusion_matrix([1, 1], [0, 1], 2)) == 0.0
    assert pearson([1.0, 1.0], [0.0, 2.0]) == 0.0
    assert spearman([1.0, 2.0], [3.0, 3.0]) == 0.0


def test_ties_share_their_ranks() -> None:
    assert ranks([10, 20, 10, 5]).tolist() == [2.5, 4, 2.5, 1]


@pytest.mark.filterwarnings("ignore:A single label")
@settings(deadline=None)  # importing scikit-learn takes seconds
@given(classes)
def test_classification_is_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    sk = pytest.importorskip("sklearn.metrics")
    predicted, true = zip(*pairs, strict=True)
    confusion = confusion_matrix(predicted, true, 4)
    assert confusion.tolist() == sk.confusion_matrix(true, predicted, labels=range(4)).tolist()
    assert accuracy(confusion) == pytest.approx(sk.accuracy_score(true, predicted))
    assert matthews(confusion) == pytest.approx(sk.matthews_corrcoef(true, predicted), abs=1e-12)
    expected = sk.f1_score(true, predicted, labels=range(4), average=None, zero_division=0)
    assert f1_scores(confusion) == pytest.approx(expected)


@settings(deadline=None)
@given(numbers)
def test_correlations_are_scipys(pairs: list[tuple[int, int]]) -> None:
    stats = pytest.importorskip("scipy.stats")
    x, y = zip(*pairs, strict=True)
    if len(set(x)) == 1 or len(set(y)) == 1:
        return
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-9)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-9)


@given(numbers)
def test_rank_correlation_ignores_any_rising_change(pairs: list[tuple[int, int]]) -> None:
    x, y = zip(*pairs, strict=True)
    assert spearman(x, y) == pytest.approx(spearman([v**3 for v in x], y), abs=1e-12)

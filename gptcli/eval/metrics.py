"""Figures of classification and regression: plain functions of what was predicted and what is true."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def confusion_matrix(predicted: Sequence[int], true: Sequence[int], n: int) -> np.ndarray:
    """(n, n) counts: rows are the true classes, columns the predicted ones."""
    out = np.zeros((n, n), np.int64)
    np.add.at(out, (np.asarray(true, np.int64), np.asarray(predicted, np.int64)), 1)
    return out


def accuracy(confusion: np.ndarray) -> float:
    return float(np.trace(confusion) / max(1, confusion.sum()))


def f1_scores(confusion: np.ndarray) -> np.ndarray:
    """Of each class: 2 TP / (2 TP + FP + FN); 0 where a class was neither there nor predicted."""
    hits = np.diag(confusion)
    return 2 * hits / np.maximum(1, confusion.sum(0) + confusion.sum(1))


def f1(confusion: np.ndarray) -> float:
    """Of two classes that of the second, the positive one, as GLUE counts it; of more, the mean of those that are there
    or were predicted, as scikit-learn's macro average."""
    scores, seen = f1_scores(confusion), confusion.sum(0) + confusion.sum(1) > 0
    return float(scores[1] if len(scores) == 2 else scores[seen].mean())


def matthews(confusion: np.ndarray) -> float:
    """Correlation of prediction and truth over classes (Gorodkin 2004); 0 where either is constant."""
    c = confusion.astype(np.float64)
    n, predicted, true = c.sum(), c.sum(0), c.sum(1)
    spread = np.sqrt((n**2 - predicted @ predicted) * (n**2 - true @ true))
    return float((np.trace(c) * n - predicted @ true) / spread) if spread else 0.0


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Linear correlation; 0 where either is constant."""
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    a, b = a - a.mean(), b - b.mean()
    spread = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / spread) if spread else 0.0


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation of the ranks, equal values sharing the mean of theirs."""
    return pearson(ranks(x).tolist(), ranks(y).tolist())


def ranks(values: Sequence[float]) -> np.ndarray:
    """From 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]

"""How sure is it? Standard errors, and whether B is really better than A: a paired bootstrap over the items.

The same items are drawn for both, so what makes an item hard for both cancels (Efron & Tibshirani 1993, chapter 16;
Koehn 2004 for language tasks).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from gptcli.randomness import derive

Array = NDArray[np.float64]
RESAMPLES = 10_000
BLOCK = 1 << 21  # draws that are held at a time
POWER = 0.8


@dataclass(frozen=True)
class Ratio:
    """A figure made of items: `then` of sum(value) / sum(weight). With weights of 1 and no `then`, a mean."""

    value: Array
    weight: Array
    then: Callable[[float], float] = float

    def figure(self) -> float:
        return self.then(math.fsum(self.value) / math.fsum(self.weight))

    def figures(self, draws: NDArray[np.int64]) -> Array:
        """One for each row of draws (R, n), which are numbers of items."""
        means = self.value[draws].sum(1) / self.weight[draws].sum(1)
        return means if self.then is float else np.array([self.then(mean) for mean in means.tolist()])


@dataclass(frozen=True)
class Comparison:
    """B - A over `n` shared items. more_items: about how many more would show a difference of this size in POWER of
    all cases; 0 where this one is shown already, None where there is none to show."""

    difference: float
    low: float
    high: float
    p_value: float
    n: int
    more_items: int | None


def paired_bootstrap(
    a: Ratio, b: Ratio, *, seed: int = 0, resamples: int = RESAMPLES, confidence: float = 0.95
) -> Comparison:
    """The interval holds the true difference with this confidence, and leaves out 0 where p < 1 - confidence.

    p is the share of resamples whose difference is as far from the observed one as that is from 0: how often chance
    alone would do this. Resampled sums vary by n - 1 where samples vary by n, which is put right here.
    """
    n = len(a.value)
    assert n == len(b.value) >= 2
    observed = b.figure() - a.figure()
    away = np.abs(_resampled_differences(a, b, seed, resamples) - observed) * math.sqrt(n / (n - 1))
    p_value = (1 + int((away >= abs(observed) * (1 - 1e-9)).sum())) / (resamples + 1)
    margin = float(np.quantile(away, confidence))
    spread = float(np.sqrt(np.square(away).mean()))
    more = 0 if p_value < 1 - confidence else more_items(observed, spread, n, confidence)
    return Comparison(observed, observed - margin, observed + margin, p_value, n, more)


def more_items(difference: float, standard_error: float, n: int, confidence: float = 0.95) -> int | None:
    """Beyond n, to show this difference in POWER of all cases: its error falls with the root of their number."""
    if difference == 0:
        return None
    normal = NormalDist()
    needed = normal.inv_cdf((1 + confidence) / 2) + normal.inv_cdf(POWER)  # in standard errors
    return max(0, math.ceil(n * (needed * standard_error / difference) ** 2) - n)


def _resampled_differences(a: Ratio, b: Ratio, seed: int, resamples: int) -> Array:
    n = len(a.value)
    rows = max(1, BLOCK // n)
    parts = []
    for block, start in enumerate(range(0, resamples, rows)):
        draw = np.random.default_rng(derive(seed, "bootstrap", block))
        draws = draw.integers(n, size=(min(rows, resamples - start), n))
        parts.append(b.figures(draws) - a.figures(draws))
    return np.concatenate(parts)

"""What a policy wrote to held-out prompts at each validation, as it lies in RUN/held_out.jsonl, and what follows from
it: best-of-n as a baseline, and whether a reward that is not trained on has turned."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
FILE = "held_out.jsonl"


@dataclass(frozen=True)
class Evaluation:
    """P prompts and m responses to each of them: first one to every prompt, then another to every prompt, ...

    At step 0 the reference wrote them; later the policy did, once to each prompt. held_out: scores by a reward that
    is not trained on.
    """

    step: int
    kl: float
    prompts: list[str]
    responses: list[str]
    lengths: list[int]  # tokens
    scores: list[float]
    held_out: list[float] | None

    def by_prompt(self, scores: Sequence[float]) -> Array:
        """(P, m)"""
        return np.array(scores).reshape(-1, len(self.prompts)).T


def read_evaluations(run: Path) -> list[Evaluation]:
    """A last line that a kill cut short is left out."""
    file = run / FILE
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    return [Evaluation(**json.loads(line)) for line in lines if line.endswith("}")]


# ---- best-of-n ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BestOf:
    """What drawing n responses of the reference and keeping the best one by the trained reward is worth, and costs."""

    n: int
    kl_bound: float
    score: float
    held_out: float | None


def best_of_curve(reference: Evaluation) -> list[BestOf]:
    """n = 1, 2, 4, ... of the m responses that the reference wrote to each prompt."""
    scores = reference.by_prompt(reference.scores)
    judged = None if reference.held_out is None else reference.by_prompt(reference.held_out)
    sizes = [1 << i for i in range(scores.shape[1].bit_length())]
    return [
        BestOf(
            n,
            kl_bound(n),
            score=float(best_of(n, scores, scores).mean()),
            held_out=None if judged is None else float(best_of(n, scores, judged).mean()),
        )
        for n in sizes
    ]


def kl_bound(n: int) -> float:
    """KL(best of n || reference) is at most this, in nats, whatever the reward."""
    return math.log(n) - (n - 1) / n


def best_of(n: int, scores: Array, judged: Array) -> Array:
    """(P,): what `judged` (P, m) expects of the response with the best of n scores, from m >= n draws, unbiased: the
    mean over all choices of n among them. Of equal scores each is as likely kept."""
    m = scores.shape[1]
    chances = np.array([math.comb(i, n - 1) / math.comb(m, n) for i in range(m)])  # of the i-th lowest to be kept
    out = []
    for row, values in zip(scores, judged, strict=True):
        _, group, counts = np.unique(row, return_inverse=True, return_counts=True)
        shared = np.add.reduceat(chances, np.cumsum(counts) - counts) / counts
        out.append(shared[group] @ values)
    return np.array(out)


# ---- over-optimisation ----------------------------------------------------------------------------------------

FALSE_ALARMS = 0.05  # of runs whose held-out reward never falls, at most so many are warned of
FEWEST = 30  # prompts from which a mean is taken for normal


@dataclass(frozen=True)
class Shift:
    """A mean of differences over the prompts, and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{abs(self.mean):.3g} ± {self.error:.2g}"


@dataclass(frozen=True)
class Turn:
    """Since `since` the held-out reward has fallen while the trained one rose."""

    since: int
    step: int
    held_out: Shift
    trained: Shift

    def __str__(self) -> str:
        return (
            f"over-optimisation: from step {self.since} to {self.step} the held-out reward fell by {self.held_out} "
            f"while the trained one rose by {self.trained}"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "since": self.since,
            "step": self.step,
            "held_out_fell": -self.held_out.mean,
            "held_out_error": self.held_out.error,
            "trained_rose": self.trained.mean,
            "trained_error": self.trained.error,
        }


def find_turn(evaluations: Sequence[Evaluation]) -> Turn | None:
    """The last evaluation against the one with the best held-out reward before it, prompt by prompt.

    The rise must exceed two standard errors, the fall z of them. The best of many is best by luck too, and every
    evaluation is another chance of a false alarm: the k-th, which any of k - 1 may be compared with, spends
    1 / (k (k - 1)) of FALSE_ALARMS, which comes to no more than all of it however long the run is.
    """
    if len(evaluations) < 2 or len(evaluations[-1].prompts) < FEWEST:
        return None
    held_out, trained = ([_by_prompt(e, which) for e in evaluations] for which in ("held_out", "scores"))
    if not all(len(means) for means in held_out):
        return None
    k = len(evaluations)
    best = max(range(k - 1), key=lambda i: held_out[i].mean())
    z = NormalDist().inv_cdf(1 - FALSE_ALARMS / (k * (k - 1) ** 2))
    fell, rose = (_shift(means[best], means[-1]) for means in (held_out, trained))
    if fell.mean < -z * fell.error and rose.mean > 2 * rose.error:
        return Turn(evaluations[best].step, evaluations[-1].step, fell, rose)
    return None


def _by_prompt(evaluation: Evaluation, which: str) -> Array:
    """Each prompt's mean; empty where there are no such scores."""
    scores = getattr(evaluation, which)
    return np.array([]) if scores is None else evaluation.by_prompt(scores).mean(1)


def _shift(before: Array, after: Array) -> Shift:
    differences = after - before
    return Shift(float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(len(differences))))

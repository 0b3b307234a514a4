"""Best-of-n by order statistics is what drawing n would give; a held-out reward that turns is told, noise is not."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from gptcli.rlhf.evaluations import (
    FILE,
    Evaluation,
    best_of,
    best_of_curve,
    find_turn,
    kl_bound,
    read_evaluations,
)


def make(step: int, scores, held_out=None, prompts: int | None = None, kl: float = 0.0) -> Evaluation:
    scores, held_out = (None if x is None else np.asarray(x, float).ravel().tolist() for x in (scores, held_out))
    P = prompts or len(scores)
    return Evaluation(step, kl, ["p"] * P, ["r"] * len(scores), [1] * len(scores), scores, held_out)


# ---- best-of-n ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_mean_over_all_choices_of_n(n: int) -> None:
    """Of equal scores each is as likely kept: written out over all choices."""
    rng = np.random.default_rng(n)
    scores, judged = rng.integers(0, 4, (6, 5)).astype(float), rng.normal(size=(6, 5))

    def kept(row: int, choice: tuple[int, ...]) -> float:
        top = max(scores[row, i] for i in choice)
        return float(np.mean([judged[row, i] for i in choice if scores[row, i] == top]))

    expected = [np.mean([kept(row, c) for c in itertools.combinations(range(5), n)]) for row in range(6)]
    assert best_of(n, scores, judged) == pytest.approx(expected)
    assert (best_of(5, scores, scores) == scores.max(1)).all()


def test_it_is_unbiased() -> None:
    """The best of 4 uniform numbers is 4/5 on average, from 16 draws as from 4."""
    draws = np.random.default_rng(0).uniform(size=(5_000, 16))
    assert best_of(4, draws, draws).mean() == pytest.approx(0.8, abs=0.005)


@pytest.mark.parametrize("n", [1, 2, 4, 64])
def test_the_bound_holds(n: int) -> None:
    """P(best = i) = F_i^n - F_{i-1}^n for outcomes in their order."""
    for size in (2, 10, 1000):
        p = np.random.default_rng(size).dirichlet(np.ones(size))
        below = np.concatenate([[0.0], p.cumsum()]).clip(max=1.0)
        best = np.diff(below**n)
        seen = best > 0
        kl = (best[seen] * np.log(best[seen] / p[seen])).sum()
        assert kl <= kl_bound(n) + 1e-9
    assert kl_bound(1) == 0
    assert kl_bound(64) == pytest.approx(math.log(64) - 63 / 64)


def test_the_curve_doubles_and_follows_the_trained_reward() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(4, 10))  # m x P, as it is written
    curve = best_of_curve(make(0, scores, -scores, prompts=10))
    assert [point.n for point in curve] == [1, 2, 4]
    assert curve[-1].score == pytest.approx(scores.max(0).mean())
    assert all(point.held_out == pytest.approx(-point.score) for point in curve)
    assert best_of_curve(make(0, scores, None, prompts=10))[0].held_out is None


# ---- over-optimisation ----------------------------------------------------------------------------------------


def runs(count: int, trend, *, evaluations: int = 15, prompts: int = 40):
    """So many runs whose held-out rewards have mean trend(k) over noise of prompts and of draws."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        ease = rng.normal(size=prompts)
        yield [
            make(k, ease + 0.3 * k + rng.normal(size=prompts), ease + trend(k) + rng.normal(size=prompts))
            for k in range(evaluations)
        ]


def alarms(run: list[Evaluation]) -> bool:
    return any(find_turn(run[: k + 1]) for k in range(len(run)))


def test_noise_is_no_turn() -> None:
    """A held-out reward that stays, under a trained one that rises all the time: the worst case for a false alarm."""
    assert np.mean([alarms(run) for run in runs(100, lambda k: 0.0)]) <= 0.05
    assert not any(alarms(run) for run in runs(20, lambda k: 0.1 * k))


def test_a_turn_is_told_with_where_it_was_best() -> None:
    found = [find_turn(run) for run in runs(20, lambda k: min(k, 8) - 1.5 * max(0, k - 8), evaluations=12)]
    assert all(turn is not None and turn.since == 8 and turn.step == 11 for turn in found)
    assert "from step 8 to 11 the held-out reward fell by 4." in str(found[0])
    assert found[0].to_json()["held_out_fell"] == pytest.approx(4.5, abs=0.8)


def test_a_collapse_of_both_is_another_matter() -> None:
    zero, one = np.zeros(64), np.ones(64)
    assert find_turn([make(0, one, one), make(1, zero, zero)]) is None
    assert find_turn([make(0, zero, one), make(1, one, zero)]) is not None  # without any noise, too


def test_what_cannot_be_told() -> None:
    zero, one = np.zeros(64), np.ones(64)
    assert find_turn([]) is None
    assert find_turn([make(0, zero, one)]) is None
    assert find_turn([make(0, zero), make(1, one)]) is None
    assert find_turn([make(0, zero[:29], one[:29]), make(1, one[:29], zero[:29])]) is None


def test_many_responses_of_the_reference_count_by_their_mean() -> None:
    several = np.concatenate([np.full(64, 0.0), np.full(64, 2.0)])
    turn = find_turn([make(0, several - 5, several, prompts=64), make(1, np.ones(64), np.zeros(64))])
    assert turn is not None
    assert turn.held_out.mean == -1


def test_files_end_where_a_kill_cut_them(tmp_path: Path) -> None:
    assert read_evaluations(tmp_path) == []
    whole = '{"step": 0, "kl": 0.0, "prompts": [], "responses": [], "lengths": [], "scores": [], "held_out": null}\n'
    (tmp_path / FILE).write_text(whole + whole[:30])
    assert [e.step for e in read_evaluations(tmp_path)] == [0]

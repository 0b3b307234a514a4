"""Sampling rules as tables, and draws against exact distributions."""

from __future__ import annotations

import math

import pytest
import torch

from gptcli.config.schema import SamplingParams
from gptcli.generate import sampling
from gptcli.generate.processors import Processors
from gptcli.generate.sampling import (
    best_of_long,
    choose,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical,
    largest,
    top_k,
)


def logits_of(*probs: float) -> torch.Tensor:
    return torch.tensor([probs]).log()


def kept(logits: torch.Tensor) -> list[int]:
    return (logits[0] > -math.inf).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("p", "hf", "openai"),
    [
        (0.7, [0, 1], [0]),
        (0.51, [0, 1], [0]),
        (0.49, [0], [0]),
        (0.81, [0, 1, 2], [0, 1]),
        (0.99, [0, 1, 2], [0, 1]),
        (1e-9, [0], [0]),
    ],
)
def test_top_p_keeps_the_crossing_token_or_drops_it_as_openai_did(p: float, hf: list[int], openai: list[int]) -> None:
    assert kept(keep_top_p(logits_of(0.5, 0.3, 0.2), p)) == hf
    assert kept(keep_top_p(logits_of(0.5, 0.3, 0.2), p, "openai")) == openai


def test_top_p_at_an_exact_boundary() -> None:
    assert kept(keep_top_p(logits_of(0.5, 0.3, 0.2), 0.5)) == [0]
    assert kept(keep_top_p(logits_of(0.5, 0.3, 0.2), 1.0)) == [0, 1, 2]


def test_top_p_does_not_depend_on_order() -> None:
    assert kept(keep_top_p(logits_of(0.2, 0.5, 0.3), 0.7)) == [1, 2]
    assert kept(keep_top_p(logits_of(0.2, 0.5, 0.3), 0.9, "openai")) == [1, 2]


def test_top_p_of_ties() -> None:
    four = logits_of(0.25, 0.25, 0.25, 0.25)
    assert len(kept(keep_top_p(four, 0.4))) == 2
    assert kept(keep_top_p(four, 0.4, "openai")) == [0, 1, 2, 3]


def test_top_k_keeps_ties() -> None:
    assert kept(keep_top_k(logits_of(0.3, 0.3, 0.3, 0.1), 2)) == [0, 1, 2]
    assert kept(keep_top_k(logits_of(0.4, 0.3, 0.2, 0.1), 2)) == [0, 1]
    assert kept(keep_top_k(logits_of(0.4, 0.6), 9)) == [0, 1]


def test_min_p_is_relative_to_the_likeliest() -> None:
    assert kept(keep_min_p(logits_of(0.6, 0.3, 0.1), 0.4)) == [0, 1]
    assert kept(keep_min_p(logits_of(0.6, 0.3, 0.1), 1.0)) == [0]


def test_typical_may_drop_the_likeliest_token() -> None:
    # the entropy is 1.36 nats; surprises: 0.69, 1.61 (thrice, nearest, then ties), so .5 is dropped at mass .4
    logits = logits_of(0.5, 0.2, 0.2, 0.1)
    assert kept(keep_typical(logits, 0.3)) == [1, 2]
    assert kept(keep_typical(logits, 0.5)) == [0, 1, 2]
    assert kept(keep_typical(logits, 0.95)) == [0, 1, 2, 3]
    assert kept(keep_typical(logits, 1e-9)) == [1, 2]
    assert kept(keep_typical(logits_of(0.6, 0.4, 0.0), 0.99)) == [0, 1]


def test_a_draw_keeps_at_least_one_token() -> None:
    logits = torch.randn(32, 50, generator=torch.Generator().manual_seed(0)) * 5
    for filtered in (keep_top_p(logits, 1e-12), keep_typical(logits, 1e-12), keep_min_p(logits, 1.0)):
        assert ((filtered > -math.inf).sum(-1) == 1).all()
    assert ((keep_top_p(logits, 1e-12, "openai") > -math.inf).sum(-1) == 1).all()


# ---- draws against the exact distribution ---------------------------------------------------------------------

PROBS = [0.05, 0.3, 0.02, 0.15, 0.25, 0.03, 0.12, 0.08]
CHI_SQUARE_999 = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32}  # by degrees of freedom


def tempered(probs: list[float], temperature: float) -> list[float]:
    return [p ** (1 / temperature) for p in probs]


def likeliest(k: int) -> list[float]:
    return [p if p in sorted(PROBS)[-k:] else 0.0 for p in PROBS]


def most_typical(k: int) -> list[float]:
    entropy = -sum(p * math.log(p) for p in PROBS)
    nearest = sorted(PROBS, key=lambda p: abs(-math.log(p) - entropy))[:k]
    return [p if p in nearest else 0.0 for p in PROBS]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, PROBS),
        ({"temperature": 0.5}, tempered(PROBS, 0.5)),
        ({"temperature": 2.0}, tempered(PROBS, 2.0)),
        ({"top_k": 3}, likeliest(3)),
        ({"top_p": 0.75}, likeliest(4)),  # .30 .25 .15 .12: the masses are .30 .55 .70 .82
        ({"top_p": 0.75, "top_p_mode": "openai"}, likeliest(3)),
        ({"min_p": 0.3}, likeliest(4)),  # at least .09
        ({"typical_p": 0.4}, most_typical(3)),  # .15 .12 .25: the masses are .15 .27 .52
        ({"temperature": 2.0, "top_k": 5, "min_p": 0.6}, tempered(likeliest(4), 2.0)),  # at least .3 * .6 ** 2
        ({"logit_bias": {"1": -100.0, "2": math.log(10)}}, [0.05, 0.0, 0.2, *PROBS[3:]]),
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(options: dict, expected: list[float]) -> None:
    """Pearson's chi-square over 20,000 draws at its 99.9% point, and nothing that has no probability."""
    n, params = 20_000, SamplingParams(**options)
    logits, ids = Processors(params, len(PROBS)).candidates(logits_of(*PROBS), None)
    drawn = choose(logits.expand(n, -1), params.temperature, [7] * n, range(n), [0] * n)
    drawn = drawn if ids is None else ids[0, drawn]
    counts = torch.bincount(drawn, minlength=len(PROBS))
    wanted = [n * p / sum(expected) for p in expected]
    assert all(count == 0 for count, w in zip(counts.tolist(), wanted, strict=True) if w == 0)
    terms = [(count - w) ** 2 / w for count, w in zip(counts.tolist(), wanted, strict=True) if w > 0]
    assert sum(terms) < CHI_SQUARE_999[len(terms) - 1]


@pytest.mark.parametrize(
    "options",
    [{}, {"top_p": 0.6}, {"min_p": 0.2}, {"typical_p": 0.5}, {"temperature": 0.5, "top_p": 0.9}],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_draw_after_top_k_is_the_one_among_all(options: dict, tied: bool) -> None:
    params = SamplingParams(top_k=20, **options)
    logits = torch.randn(500, 300, generator=torch.Generator().manual_seed(1)) * 2
    if tied:  # the 20th and the 21st
        logits.scatter_(1, logits.topk(21).indices[:, 20:], logits.topk(21).values[:, 19:20])
    logits[:, 280:] = -torch.inf
    process, where = Processors(params, 300), ([7] * 500, range(500), [3] * 500)
    some, ids = process.candidates(logits, None)
    assert (ids is None) == tied
    drawn = choose(some, params.temperature, *where)
    drawn = drawn if ids is None else ids.gather(1, drawn[:, None])[:, 0]
    assert torch.equal(drawn, choose(process(logits, None), params.temperature, *where))


@pytest.mark.parametrize("V", [1024, 1025, 5000, 50257])
@pytest.mark.parametrize("ties", [False, True])
def test_the_best_of_a_long_row_are_those_of_the_whole_row(V: int, ties: bool) -> None:
    x = torch.randn(5, V, generator=torch.Generator().manual_seed(V))
    x = (4 * x).round() if ties else x
    x[0, 7:] = -torch.inf  # fewer than are asked for
    x[1, V - 3 :] = 100.0  # behind the last block
    for n in (1, 4, 20):
        best, ids = best_of_long(x, n)
        assert torch.equal(best, x.topk(n).values)
        assert torch.equal(x.gather(1, ids), best)
        assert all(len(set(row)) == n for row in ids.tolist())


def test_fewer_allowed_tokens_than_top_k_are_no_tie() -> None:
    logits = logits_of(0.6, 0.0, 0.4, 0.0)
    best = top_k(logits, 3)
    assert best is not None
    assert best[0][best[0] > -torch.inf].tolist() == logits[0, [0, 2]].tolist()


def test_a_token_of_no_probability_is_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    for u in (0.0, 0.49999, 0.5, 0.999999999):
        assert draw(logits, torch.tensor([u])).item() in (1, 3)


def test_a_draw_depends_on_seed_stream_and_position_alone() -> None:
    logits = torch.zeros(1, 1000)
    alone = choose(logits, 1.0, [1], [5], [9])
    among = choose(logits.expand(3, 1000), 1.0, [7, 1, 8], [4, 5, 6], [9, 9, 9])
    assert among[1] == alone[0]
    for varied in ([range(20), [5] * 20, [9] * 20], [[1] * 20, range(20), [9] * 20], [[1] * 20, [5] * 20, range(20)]):
        assert len(set(choose(logits.expand(20, 1000), 1.0, *varied).tolist())) > 10


def test_temperature_zero_is_greedy() -> None:
    logits = torch.randn(8, 50)
    params = SamplingParams(temperature=0.0, top_k=3, top_p=0.1)
    processed = Processors(params, 50)(logits, None)
    assert torch.equal(choose(processed, 0.0, [0] * 8, range(8), range(8)), logits.argmax(-1))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_nucleus_is_the_same_looked_for_in_a_short_list_or_in_all(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with ties at its border, and for rows of which one needs a longer list than the other."""
    rows = torch.randn(3, 400, dtype=torch.float64)
    logits = torch.stack([rows[0] * 6, rows[1] * 0.1, (rows[2] * 2).round()])
    for mode in ("hf", "openai"):
        monkeypatch.setattr(sampling, "SHORT_LIST", 1000)
        whole = keep_top_p(logits, p, mode)
        for short in (1, 4, 50):
            monkeypatch.setattr(sampling, "SHORT_LIST", short)
            assert torch.equal(keep_top_p(logits, p, mode), whole)
            alone = torch.cat([keep_top_p(row[None], p, mode) for row in logits])
            assert torch.equal(alone, whole)


def test_largest_gives_no_more_than_there_is() -> None:
    rows = torch.tensor([[0.25, 0.75], [0.5, 0.125]])
    assert largest(rows, 9) == [[(1, 0.75), (0, 0.25)], [(0, 0.5), (1, 0.125)]]
    assert largest(rows, 1) == [[(1, 0.75)], [(0, 0.5)]]
    assert largest(rows, 0) == [[], []]

"""Sampling rules as tables, and draws against exact distributions."""

from __future__ import annotations

import math

import pytest
import torch

from gptcli.config.schema import SamplingParams
from gptcli.generate.sampling import (
    choose,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    process,
)


def logits_of(*probs: float) -> torch.Tensor:
    return torch.tensor([probs]).log()


def kept(logits: torch.Tensor) -> list[int]:
    return (logits[0] > -math.inf).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("p", "expected"),
    [(0.7, [0, 1]), (0.5, [0]), (0.51, [0, 1]), (0.81, [0, 1, 2]), (1.0, [0, 1, 2]), (1e-9, [0])],
)
def test_top_p_keeps_the_crossing_token(p: float, expected: list[int]) -> None:
    assert kept(keep_top_p(logits_of(0.5, 0.3, 0.2), p)) == expected


def test_top_p_does_not_depend_on_order() -> None:
    assert kept(keep_top_p(logits_of(0.2, 0.5, 0.3), 0.7)) == [1, 2]


def test_top_k_keeps_ties() -> None:
    assert kept(keep_top_k(logits_of(0.3, 0.3, 0.3, 0.1), 2)) == [0, 1, 2]
    assert kept(keep_top_k(logits_of(0.4, 0.3, 0.2, 0.1), 2)) == [0, 1]
    assert kept(keep_top_k(logits_of(0.4, 0.6), 9)) == [0, 1]


def test_min_p_is_relative_to_the_likeliest() -> None:
    assert kept(keep_min_p(logits_of(0.6, 0.3, 0.1), 0.4)) == [0, 1]
    assert kept(keep_min_p(logits_of(0.6, 0.3, 0.1), 1.0)) == [0]


def test_repetition_penalty_divides_positive_and_multiplies_negative() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.0]])
    seen = torch.tensor([[True, True, False, True]])
    assert penalize_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0, 0.0]]
    assert torch.equal(penalize_repetition(logits, seen, 1.0), logits)


def test_processors_run_in_order() -> None:
    logits, seen = torch.tensor([[3.0, 2.0, 1.0, -1.0]]), torch.tensor([[True, False, False, False]])
    params = SamplingParams(repetition_penalty=3.0, temperature=0.5, top_k=3, top_p=0.85)
    # penalty: 1 2 1 -1; temperature: 2 4 2 -2; top-k 3 drops the last; masses .787 .107 .107: top-p keeps two
    assert kept(process(logits, params, seen)) == [0, 1]
    other_order = keep_top_p(keep_top_k(logits, 3), 0.85)
    assert kept(other_order) == [0, 1]
    assert kept(process(logits, SamplingParams(repetition_penalty=3.0, top_p=0.5), seen)) == [1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 3},
        {"top_p": 0.8},
        {"min_p": 0.3},
        {"temperature": 1.5, "top_k": 4, "top_p": 0.9},
    ],
)
def test_processed_logits_equal_transformers(options: dict[str, float]) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.generation import logits_process as hf

    torch.manual_seed(0)
    logits = torch.randn(16, 50) * 3
    warpers = transformers.LogitsProcessorList()
    if "temperature" in options:
        warpers.append(hf.TemperatureLogitsWarper(options["temperature"]))
    if "top_k" in options:
        warpers.append(hf.TopKLogitsWarper(int(options["top_k"])))
    if "top_p" in options:
        warpers.append(hf.TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        warpers.append(hf.MinPLogitsWarper(options["min_p"]))
    expected = warpers(torch.zeros(16, 1, dtype=torch.long), logits.clone())
    torch.testing.assert_close(process(logits, SamplingParams(**options), None), expected)


def test_repetition_penalty_equals_transformers() -> None:
    pytest.importorskip("transformers")
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    logits, ids = torch.randn(4, 20), torch.randint(0, 20, (4, 9))
    seen = torch.zeros(4, 20, dtype=torch.bool).scatter(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    torch.testing.assert_close(process(logits, SamplingParams(repetition_penalty=1.3), seen), expected)


def test_draws_follow_the_distribution() -> None:
    """Pearson's chi-square over 20,000 draws; the 99.9% point for 4 degrees of freedom is 18.47."""
    probs = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    n = 20_000
    picks = choose(probs.log().expand(n, 5), SamplingParams(seed=7), range(n), [0] * n)
    counts = torch.bincount(picks, minlength=5).double()
    assert (((counts - n * probs) ** 2) / (n * probs)).sum().item() < 18.47


def test_a_token_of_no_probability_is_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    for u in (0.0, 0.49999, 0.5, 0.999999999):
        assert draw(logits, torch.tensor([u])).item() in (1, 3)


def test_a_draw_depends_on_seed_stream_and_position_alone() -> None:
    logits, params = torch.zeros(1, 1000), SamplingParams(seed=1)
    alone = choose(logits, params, [5], [9])
    among = choose(logits.expand(3, 1000), params, [4, 5, 6], [9, 9, 9])
    assert among[1] == alone[0]
    assert len({int(choose(logits, SamplingParams(seed=s), [5], [9])) for s in range(20)}) > 10


def test_temperature_zero_is_greedy() -> None:
    logits = torch.randn(8, 50)
    params = SamplingParams(temperature=0.0, top_k=3, top_p=0.1)
    assert torch.equal(choose(process(logits, params, None), params, range(8), range(8)), logits.argmax(-1))

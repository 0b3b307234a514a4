"""Pinned numbers: a change in any of these is a change in what every run means, and must be meant."""

from __future__ import annotations

import pytest

from gptcli.randomness import Permutation, derive, uniform
from tests.conftest import Tiny

LOSSES = {
    "adamw": [5.53242, 5.48774, 5.38414, 5.25253, 5.08646, 4.87239],
    "muon": [5.53242, 5.49742, 5.40015, 5.25808, 5.09121, 4.87466],
}


@pytest.mark.parametrize("name", LOSSES)
def test_first_losses(tiny: Tiny, name: str) -> None:
    tiny.train(f"optim.name={name}", "train.max_steps=6")
    assert [row["loss"] for row in tiny.metrics()] == pytest.approx(LOSSES[name], abs=2e-4)


def test_derived_randomness() -> None:
    assert derive(1337, "dropout", 3, 0, 1) == 1941211267901900105
    assert uniform(0, "sample", 2, 5) == pytest.approx(0.5082600071894974, abs=1e-12)
    assert Permutation(10, 7)[range(10)].tolist() == [1, 3, 0, 2, 9, 5, 7, 6, 4, 8]

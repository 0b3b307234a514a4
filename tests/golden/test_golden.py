"""Pinned numbers: a change in any of these is a change in what every run means, and must be meant."""

from __future__ import annotations

import pytest

from gptcli.randomness import Permutation, derive, uniform
from tests.conftest import Tiny

LOSSES = {
    "adamw": [],
    "muon": [],
}


@pytest.mark.parametrize("name", LOSSES)
def test_first_losses(tiny: Tiny, name: str) -> None:
    tiny.train(f"optim.name={name}", "train.max_steps=6")
    assert [row["loss"] for row in tiny.metrics()] == pytest.approx(LOSSES[name], abs=2e-4)


def test_derived_randomness() -> None:
    assert derive(1337, "dropout", 3, 0, 1) == 0
    assert uniform(0, "sample", 2, 5) == pytest.approx(0, abs=1e-12)
    assert Permutation(10, 7)[range(10)].tolist() == []

"""Rows of prompts and responses: what counts, and where it stands."""

from __future__ import annotations

import torch

from gptcli.contracts import IGNORE_INDEX
from gptcli.rlhf.sequences import last_index, masked_mean, pass_order, response_rows


def test_targets_are_the_response_whatever_its_ids() -> None:
    eos = 0  # the padding's id too
    tokens, targets = response_rows([[5, 6], [7]], [[8, eos], [9, 9, eos]])
    assert tokens.tolist() == [[5, 6, 8], [7, 9, 9]]
    assert targets.tolist() == [[IGNORE_INDEX, 8, eos], [9, 9, eos]]
    tokens, targets = response_rows([[5]], [[eos]], width=3)
    assert targets.tolist() == [[eos, IGNORE_INDEX, IGNORE_INDEX]]


def test_the_last_place_on_either_side() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 0, 0]]).bool()
    assert last_index(mask).tolist() == [1, 3, 3, 1]


def test_a_mean_ignores_what_is_no_number() -> None:
    x = torch.tensor([1.0, float("nan"), 3.0, float("inf")])
    assert masked_mean(x, torch.tensor([True, False, True, False])) == 2


def test_every_pass_visits_all_in_an_order_of_its_own() -> None:
    order = pass_order(7, 1, "test", range(21))
    passes = [order[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert passes[0] != passes[1] != passes[2]
    assert pass_order(7, 1, "test", range(5, 9)) == order[5:9]

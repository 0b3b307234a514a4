"""Advantages against sums written out, and what may stand behind a response."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptcli.rlhf.gae import gae, group_advantages, token_rewards, whiten

T = 7


def ragged(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """rewards, values and a mask of responses that begin and end anywhere."""
    g = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(4, T, generator=g), torch.randn(4, T, generator=g)
    first, length = torch.randint(0, 3, (4,), generator=g), torch.randint(1, 5, (4,), generator=g)
    places = torch.arange(T)
    return rewards, values, (places >= first[:, None]) & (places < (first + length)[:, None])


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_sum_of_discounted_errors(seed: int, gamma: float, lam: float) -> None:
    rewards, values, mask = ragged(seed)
    ours = gae(rewards, values, mask, gamma=gamma, gae_lambda=lam)
    for row in range(len(mask)):
        places = mask[row].nonzero()[:, 0].tolist()
        after = [*(values[row, t].item() for t in places[1:]), 0.0]
        errors = [
            rewards[row, t].item() + gamma * nxt - values[row, t].item() for t, nxt in zip(places, after, strict=True)
        ]
        for i, t in enumerate(places):
            expected = sum((gamma * lam) ** k * error for k, error in enumerate(errors[i:]))
            assert ours[row, t].item() == pytest.approx(expected, abs=1e-4)
    assert (ours[~mask] == 0).all()


def test_with_lambda_1_it_is_what_followed_less_the_value() -> None:
    rewards, values, mask = ragged(3)
    ours = gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    followed = torch.where(mask, rewards, 0.0).flip(1).cumsum(1).flip(1)
    assert torch.allclose(ours, torch.where(mask, followed - values, 0.0), atol=1e-5)


def test_what_stands_behind_the_end_changes_nothing() -> None:
    rewards, values, mask = ragged(5)
    plain = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.95)
    for junk in (1e9, float("nan"), float("inf")):
        dirty = [torch.where(mask, x, junk) for x in (rewards, values)]
        assert torch.equal(gae(*dirty, mask, gamma=1.0, gae_lambda=0.95), plain)


@pytest.mark.parametrize("keep_mean", [False, True])
def test_whitening_sees_the_response_alone(keep_mean: bool) -> None:
    x, junk, mask = ragged(7)
    ours = whiten(torch.where(mask, x, junk * 1e6), mask, keep_mean=keep_mean)
    kept = x[mask].double()
    expected = (kept - kept.mean()) / (kept.var(correction=0) + 1e-8).sqrt() + (kept.mean() if keep_mean else 0)
    assert torch.allclose(ours[mask].double(), expected, atol=1e-5)
    assert (ours[~mask] == 0).all()


def test_the_score_lands_on_the_last_token_and_every_token_pays_its_kl() -> None:
    mask = torch.tensor([[False, True, True, False], [True, True, True, True], [False, False, True, False]])
    kl = torch.where(mask, 1.0, float("nan"))
    ours = token_rewards(torch.tensor([10.0, 20.0, 30.0]), kl, mask, kl_coef=0.5)
    expected = [[0, -0.5, 9.5, 0], [-0.5, -0.5, -0.5, 19.5], [0, 0, 29.5, 0]]
    assert torch.equal(ours, torch.tensor(expected))


@given(st.lists(st.floats(-10, 10), min_size=8, max_size=8), st.sampled_from(["mean", "leave_one_out"]))
def test_a_groups_advantages_add_up_to_nothing(rewards: list[float], baseline: str) -> None:
    for scale in ("none", "group", "batch"):
        ours = group_advantages(torch.tensor(rewards), 4, baseline=baseline, scale=scale)
        assert ours.view(2, 4).sum(1).abs().max() < 1e-3 * (1 + ours.abs().max())


def test_leave_one_out_is_the_reward_less_the_mean_of_the_others() -> None:
    rewards = torch.tensor([1.0, 5.0, 3.0, 0.0, 2.0, 10.0])
    ours = group_advantages(rewards, 3, baseline="leave_one_out", scale="none")
    assert torch.allclose(ours, torch.tensor([1 - 4.0, 5 - 2.0, 3 - 3.0, 0 - 6.0, 2 - 5.0, 10 - 1.0]))


def test_equal_rewards_teach_nothing() -> None:
    for scale in ("none", "group", "batch"):
        assert (group_advantages(torch.full((8,), 0.3), 4, baseline="mean", scale=scale).abs() < 1e-3).all()

"""The losses of rlhf-reward and rlhf-dpo: known values, symmetries, gradients, and how batches may be split."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gptcli.config.schema import ModelConfig
from gptcli.contracts import Batch
from gptcli.model import GPT
from gptcli.rlhf.comparisons import batches, responses_alone, whole_rows
from gptcli.rlhf.preferences import Comparison, Pair
from gptcli.train.objectives.dpo import DPO, preference_loss
from gptcli.train.objectives.reward import BradleyTerry, pair_loss

CONFIG = ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=16, vocab_size=9, vocab_pad_multiple=1)


def model(**heads: int) -> GPT:
    made = GPT(ModelConfig(**{**vars(CONFIG), "scalar_heads": heads, "init_std": 0.3}))
    made.init_weights(1)
    return made


COMPARISONS = [
    Comparison([1, 2], [[3, 8], [4, 5, 8]], [Pair(0, 1)]),
    Comparison([1], [[3, 3, 3, 8], [8]], [Pair(1, 0, p=0.8, margin=0.5)]),
    Comparison([7, 6, 5], [[2, 8], [3, 8], [4, 4, 8]], [Pair(2, 0), Pair(2, 1), Pair(0, 1)]),
]


def with_reference(batch: Batch, reference: GPT | None) -> Batch:
    zeros = torch.zeros(batch["tokens"].shape)
    with torch.no_grad():
        logprobs = zeros if reference is None else reference(batch["tokens"], targets=batch["targets"]).logprobs
    return Batch({**batch.tensors, "ref_logprobs": logprobs}, batch.weight, batch.tokens)


# ---- reward ---------------------------------------------------------------------------------------------------


def test_a_head_that_knows_nothing_loses_ln_2() -> None:
    policy = model(reward=1)
    torch.nn.init.zeros_(policy.get_parameter("scalar_heads.reward.weight"))
    loss = BradleyTerry(margins=False)(policy, whole_rows(COMPARISONS)).loss
    assert loss.item() / len(COMPARISONS) == pytest.approx(math.log(2), abs=1e-6)


def test_a_constant_changes_nothing() -> None:
    policy, batch = model(reward=1), whole_rows(COMPARISONS)
    before = BradleyTerry()(policy, batch).loss.item()
    torch.nn.init.constant_(policy.get_parameter("scalar_heads.reward.bias"), 7.0)
    assert BradleyTerry()(policy, batch).loss.item() == pytest.approx(before, abs=1e-5)


def test_a_new_head_has_the_papers_spread() -> None:
    wide = GPT(ModelConfig(**{**vars(CONFIG), "n_embd": 1024, "scalar_heads": {"reward": 1}}))
    wide.init_weights(0)
    assert wide.get_parameter("scalar_heads.reward.weight").std().item() == pytest.approx(1 / math.sqrt(1025), rel=0.1)
    assert wide.get_parameter("scalar_heads.reward.bias").item() == 0


def test_the_gradient_is_that_of_finite_differences() -> None:
    delta = torch.tensor([0.7, -1.2, 0.1], dtype=torch.float64, requires_grad=True)
    p, margin = torch.tensor([1.0, 0.8, 0.3], dtype=torch.float64), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda d: pair_loss(d, p, margin), (delta,))
    for kind in ("sigmoid", "conservative", "ipo"):
        assert torch.autograd.gradcheck(lambda d, kind=kind: preference_loss(d, p, 0.3, kind, 0.1), (delta,))


def test_a_margin_asks_for_more() -> None:
    delta, p = torch.tensor([1.0]), torch.tensor([1.0])
    assert pair_loss(delta, p, 1.0).item() == pytest.approx(math.log(2))
    assert pair_loss(delta, p, 0.0) < pair_loss(delta, p, 0.5)


def test_a_ranking_counts_once_however_many_pairs_it_has() -> None:
    batch = whole_rows(COMPARISONS)
    assert batch.weight == 3
    assert batch["share"].sum().item() == pytest.approx(3)


# ---- DPO ------------------------------------------------------------------------------------------------------


def test_a_policy_that_is_the_reference_loses_ln_2_and_still_learns() -> None:
    policy = model()
    out = DPO(beta=0.1)(policy, with_reference(responses_alone(COMPARISONS), policy))
    assert out.loss.item() / len(COMPARISONS) == pytest.approx(math.log(2), abs=1e-6)
    out.loss.backward()
    assert policy.wte.weight.grad is not None
    assert policy.wte.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "conservative"])
def test_swapping_answers_and_labels_changes_nothing(kind: str) -> None:
    delta, p = torch.tensor([0.3, -2.0, 1.1]), torch.tensor([1.0, 0.2, 0.6])
    swapped = preference_loss(-delta, 1 - p, 0.2, kind, 0.1)
    assert torch.allclose(preference_loss(delta, p, 0.2, kind, 0.1), swapped, atol=1e-6)


def test_ipo_aims_at_a_gap_and_the_conservative_loss_at_its_labels() -> None:
    one = torch.ones(1)
    assert preference_loss(torch.tensor([2.5]), one, 0.2, "ipo", 0.0).item() == 0
    best = torch.logit(torch.tensor([0.9])) / 0.2  # with a tenth of the labels wrong
    around = [preference_loss(best + shift, one, 0.2, "conservative", 0.1).item() for shift in (-0.5, 0.0, 0.5)]
    assert min(around) == around[1]


def test_log_probabilities_are_summed_or_averaged() -> None:
    """A gain of g a token is worth the same to both only where lengths are."""
    policy = model()
    batch = with_reference(responses_alone(COMPARISONS[1:2]), policy)
    shifted = {**batch.tensors, "ref_logprobs": batch["ref_logprobs"] - 0.1 * (batch["targets"] != -100)}
    batch = Batch(shifted, batch.weight, batch.tokens)
    gap = {kind: DPO(beta=1.0, per_token=kind)(policy, batch).metrics["reward_gap"].item() for kind in (False, True)}
    assert gap[False] == pytest.approx(0.1 * (1 - 4), abs=1e-5)  # 1 token against 4
    assert gap[True] == pytest.approx(0.0, abs=1e-5)


def test_end_of_text_is_learned() -> None:
    targets = responses_alone(COMPARISONS)["targets"]
    assert (targets == 8).sum(1).tolist() == [1] * len(targets)


# ---- batches --------------------------------------------------------------------------------------------------


def test_comparisons_of_like_length_share_a_batch() -> None:
    lengths = (3, 14, 4, 13)
    mixed = [Comparison([1] * n, [[8], [2, 8]], [Pair(0, 1)]) for n in lengths]
    made = batches(mixed, whole_rows, 2)
    assert [batch["tokens"].shape[1] for batch in made] == [6, 16]
    assert sum(batch.tokens for batch in made) == whole_rows(mixed).tokens


@pytest.mark.parametrize("objective", [BradleyTerry(), DPO(beta=0.3), DPO(beta=0.3, loss="ipo", per_token=True)])
def test_losses_and_gradients_add_up_over_any_split(objective: Any) -> None:
    is_reward = isinstance(objective, BradleyTerry)
    policy, reference = model(reward=1) if is_reward else model(), model()
    with torch.no_grad():
        policy.wte.weight.add_(0.1)

    def grads(split: list[int]) -> torch.Tensor:
        policy.zero_grad()
        first = 0
        for size in split:
            part = COMPARISONS[first : first + size]
            batch = whole_rows(part) if is_reward else with_reference(responses_alone(part), reference)
            objective(policy, batch).loss.backward()
            first += size
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    whole = grads([3])
    for split in ([1, 2], [2, 1], [1, 1, 1]):
        assert torch.allclose(grads(split), whole, atol=1e-5)

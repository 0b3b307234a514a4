"""PPO's and GRPO's losses against numpy, and what must not matter to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gptcli.config.schema import ModelConfig
from gptcli.contracts import IGNORE_INDEX, Batch
from gptcli.model import GPT
from gptcli.rlhf.kl import k2
from gptcli.rlhf.sequences import response_rows
from gptcli.train.objectives.grpo import GRPO
from gptcli.train.objectives.ppo import PPO, clipped_loss, clipped_value_loss

CONFIG = ModelConfig(
    n_layer=1,
    n_head=2,
    n_embd=16,
    context_length=16,
    vocab_size=9,
    vocab_pad_multiple=1,
    scalar_heads={"value": 1},
    init_std=0.3,
)


def policy() -> GPT:
    model = GPT(CONFIG)
    model.init_weights(1)
    return model


def batch(width: int | None = None) -> Batch:
    """Responses of 1 to 4 tokens, with old log-probabilities that are off by a little."""
    prompts, responses = [[1, 2], [3], [4, 5, 6], [7]], [[1, 8], [8], [2, 2, 2, 8], [5, 5, 5]]
    tokens, targets = response_rows(prompts, responses, width)
    with torch.no_grad():
        logprobs = policy()(tokens, targets=targets, temperature=0.7).logprobs
    mask, g = targets != IGNORE_INDEX, torch.Generator().manual_seed(0)
    noise = torch.zeros(4, 16)
    noise[:] = torch.randn(4, 16, generator=g)

    def per_token(scale: float) -> torch.Tensor:
        """The same numbers for the same response tokens, whatever the width; rubbish elsewhere."""
        out = torch.full(tokens.shape, float("nan"))
        for row in range(4):
            places = mask[row].nonzero()[:, 0]
            out[row, places] = scale * noise[row, : len(places)]
        return out

    tensors = {"tokens": tokens, "targets": targets, "logprobs": logprobs + per_token(0.2).nan_to_num()}
    tensors |= {"ref_logprobs": logprobs + per_token(0.3).nan_to_num(), "values": per_token(0.5)}
    tensors |= {"advantages": per_token(1.0), "returns": per_token(-1.0)}
    return Batch(tensors, weight=int(mask.sum()), tokens=int(mask.sum()))


def ppo(value_coef: float = 0.1) -> PPO:
    return PPO(clip_range=0.2, value_clip=0.2, value_coef=value_coef, temperature=0.7)


def grpo(**changes: object) -> GRPO:
    return GRPO(**{"clip_range": 0.2, "temperature": 0.7, "ratio": "token", "normalization": "token",
                   "max_new_tokens": 4, **changes})  # fmt: skip


def for_groups(whole: Batch) -> Batch:
    return Batch({**whole.tensors, "advantages": torch.tensor([1.0, -1.0, 0.5, 2.0])}, whole.weight, whole.tokens)


def test_losses_are_numpys() -> None:
    rng = np.random.default_rng(0)
    ratio, advantage = np.exp(rng.normal(size=50) * 0.5), rng.normal(size=50)
    expected = -np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
    assert np.allclose(clipped_loss(torch.tensor(ratio), torch.tensor(advantage), 0.2), expected)
    value, old, returns = rng.normal(size=(3, 50))
    near = np.clip(value, old - 0.2, old + 0.2)
    expected = 0.5 * np.maximum((value - returns) ** 2, (near - returns) ** 2)
    assert np.allclose(clipped_value_loss(*map(torch.tensor, (value, old, returns)), 0.2), expected)


def test_a_policy_that_has_not_moved_has_ratios_of_exactly_1() -> None:
    whole, model = batch(), policy()
    with torch.no_grad():
        now = model(whole["tokens"], targets=whole["targets"], temperature=0.7).logprobs
    same = Batch({**whole.tensors, "logprobs": now}, whole.weight, whole.tokens)
    out = ppo()(model, same)
    mask = whole["targets"] != IGNORE_INDEX
    assert out.metrics["clip_fraction"].item() == 0
    assert out.metrics["approx_kl"].item() == 0
    assert out.metrics["policy_loss"].item() == -whole["advantages"][mask].sum().item()


def test_another_temperature_is_another_policy() -> None:
    whole, model = batch(), policy()
    with torch.no_grad():
        now = model(whole["tokens"], targets=whole["targets"], temperature=0.7).logprobs
    same = Batch({**whole.tensors, "logprobs": now}, whole.weight, whole.tokens)
    assert PPO(0.2, 0.2, 0.1, temperature=1.0)(model, same).metrics["approx_kl"] > 0.01


GRPO_KINDS = [
    {},
    {"normalization": "sequence"},
    {"normalization": "constant"},
    {"ratio": "sequence"},
    {"kl_coef": 0.1, "kl_loss": k2},
]


@pytest.mark.parametrize("kind", [None, *GRPO_KINDS])
def test_padding_and_splits_change_nothing(kind: dict | None) -> None:
    objective = ppo() if kind is None else grpo(**kind)
    model = policy()

    def grads(whole: Batch, split: list[int]) -> torch.Tensor:
        model.zero_grad()
        first, weight = 0, 0.0
        for size in split:
            rows = {name: t[first : first + size] for name, t in whole.tensors.items()}
            mask = rows["targets"] != IGNORE_INDEX
            weight += int(mask.sum()) if kind is None else objective.weight(mask)
            objective(model, Batch(rows, 0, 0)).loss.backward()
            first += size
        parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return torch.cat(parts) / weight

    make = batch if kind is None else lambda width=None: for_groups(batch(width))
    expected = grads(make(), [4])
    assert expected.isfinite().all()
    assert expected.abs().max() > 1e-3
    for whole, split in ((make(), [1, 3]), (make(), [2, 2]), (make(11), [4]), (make(11), [3, 1])):
        assert torch.allclose(grads(whole, split), expected, atol=1e-5)


def test_what_grpo_averages_over() -> None:
    """With a ratio of 1 the loss is -advantage, weighted as its normalization says."""
    whole, model = for_groups(batch()), policy()
    with torch.no_grad():
        now = model(whole["tokens"], targets=whole["targets"], temperature=0.7).logprobs
    same = Batch({**whole.tensors, "logprobs": now}, whole.weight, whole.tokens)
    mask, advantages, lengths = whole["targets"] != IGNORE_INDEX, whole["advantages"], torch.tensor([2.0, 1, 4, 3])
    expected = {
        "token": (advantages * lengths).sum() / lengths.sum(),
        "sequence": advantages.mean(),
        "constant": (advantages * lengths / 4).mean(),
    }
    for normalization, value in expected.items():
        objective = grpo(normalization=normalization)
        assert objective(model, same).loss.item() / objective.weight(mask) == pytest.approx(-value.item(), abs=1e-5)
    rloo = grpo(ratio="sequence")
    assert rloo(model, same).loss.item() / rloo.weight(mask) == pytest.approx(-advantages.mean().item(), abs=1e-5)

"""Chunked log-probabilities against the plain computation."""

from __future__ import annotations

import pytest
import torch

from gptcli.config.memory import LogitsRoom
from gptcli.model import logprobs as lp


def chunked(monkeypatch: pytest.MonkeyPatch, chunk: int, *, kept: bool = True) -> None:
    monkeypatch.setattr(lp, "logits_room", lambda half: LogitsRoom(chunk, 1 << 30 if kept else 0))


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("some", [True, False])  # only positions with a target meet the head, as on a CPU, or all
def test_values_and_gradients_equal_autograd(
    monkeypatch: pytest.MonkeyPatch, kept: bool, temperature: float, entropy: bool, some: bool
) -> None:
    if not some:
        monkeypatch.setattr(lp, "_some", lambda targets: None)
    chunked(monkeypatch, 4 * 64 * 5, kept=kept)  # five rows a chunk
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, 8, dtype=torch.float32, requires_grad=True)
    head = torch.randn(64, 8, requires_grad=True)
    targets = torch.randint(0, 50, (2, 9))
    targets[0, 3] = targets[1, 8] = lp.IGNORE_INDEX
    weights, entropy_weights = torch.randn(2, 9), torch.randn(2, 9)

    got, got_entropy = lp.token_logprobs(hidden, head, targets, vocab_size=50, temperature=temperature, entropy=entropy)
    loss = (got * weights).sum() + ((got_entropy * entropy_weights).sum() if entropy else 0)
    grads = torch.autograd.grad(loss, (hidden, head))

    full = ((hidden @ head.T)[..., :50] / temperature).log_softmax(-1)
    picked = full.gather(2, targets.clamp(min=0)[..., None])[..., 0] * (targets != lp.IGNORE_INDEX)
    expected_entropy = -(full.exp() * full).sum(-1) * (targets != lp.IGNORE_INDEX)
    expected_loss = (picked * weights).sum() + ((expected_entropy * entropy_weights).sum() if entropy else 0)
    expected = torch.autograd.grad(expected_loss, (hidden, head))

    torch.testing.assert_close(got, picked, atol=1e-5, rtol=1e-5)
    if entropy:
        torch.testing.assert_close(got_entropy, expected_entropy, atol=1e-5, rtol=1e-5)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert grads[1][50:].abs().max() == 0  # padded rows learn nothing


@pytest.mark.parametrize("kept", [True, False])
def test_half_precision_comes_as_near_as_its_numbers_allow(monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    """Kept, it is the logits that are; chunks, padding and temperature as ever."""
    chunked(monkeypatch, 4 * 64 * 5, kept=kept)
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 9, 8), torch.randn(64, 8)
    targets = torch.randint(0, 50, (2, 9))
    grads = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [t.bfloat16().to(dtype).requires_grad_() for t in (hidden, head)]
        values, entropies = lp.token_logprobs(*leaves, targets, vocab_size=50, temperature=0.7, entropy=True)
        assert values.dtype == torch.float32
        assert entropies is not None
        grads.append(torch.autograd.grad(values.sum() + entropies.sum(), leaves))
    for ours, exact in zip(*grads, strict=True):
        assert (ours.float() - exact).norm() < 0.02 * exact.norm()


def test_all_logits_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    chunked(monkeypatch, 4 * 1024 * 16, kept=False)
    seen: list[int] = []
    original = lp._logits

    def spy(hidden: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(hidden.shape[0])
        return original(hidden, *rest)

    monkeypatch.setattr(lp, "_logits", spy)
    hidden, head = torch.randn(1, 100, 4, requires_grad=True), torch.randn(1024, 4)
    values, _ = lp.token_logprobs(hidden, head, torch.zeros(1, 100, dtype=torch.long), vocab_size=1024)
    values.sum().backward()
    assert max(seen) == 16
    assert sum(seen) == 200  # forward, and again for the backward


def test_a_row_without_any_target_gives_zeros_and_gradients_of_zero() -> None:
    hidden, head = torch.randn(2, 7, 8, requires_grad=True), torch.randn(64, 8, requires_grad=True)
    nothing = torch.full((2, 7), lp.IGNORE_INDEX)
    values, entropy = lp.token_logprobs(hidden, head, nothing, vocab_size=50, entropy=True)
    assert not values.any()
    assert not entropy.any()
    grads = torch.autograd.grad(values.sum() + entropy.sum(), (hidden, head))
    assert not any(g.any() for g in grads)


def test_entropy_is_at_least_zero_and_at_most_ln_vocab() -> None:
    hidden, head = torch.randn(2, 7, 8), torch.randn(64, 8)
    _, entropy = lp.token_logprobs(hidden, head, torch.zeros(2, 7, dtype=torch.long), vocab_size=50, entropy=True)
    assert (entropy >= 0).all()
    assert (entropy <= torch.log(torch.tensor(50.0)) + 1e-5).all()


def test_measuring_gives_the_same_and_says_what_is_likeliest(monkeypatch: pytest.MonkeyPatch) -> None:
    chunked(monkeypatch, 4 * 64 * 5)
    torch.manual_seed(0)
    hidden, head = torch.randn(3, 9, 8), torch.randn(64, 8)
    head[50:] = 100.0  # padding of the vocabulary never wins
    logits = (hidden @ head.T)[..., :50]
    targets = torch.where(torch.rand(3, 9) < 0.5, logits.argmax(-1), torch.randint(0, 50, (3, 9)))
    targets[:, ::3] = lp.IGNORE_INDEX
    logprobs, greedy = lp.measure_targets(hidden, head, targets, vocab_size=50)
    torch.testing.assert_close(logprobs, lp.token_logprobs(hidden, head, targets, vocab_size=50)[0])
    assert torch.equal(greedy, logits.argmax(-1) == targets)
    nothing = torch.full((3, 9), lp.IGNORE_INDEX)
    logprobs, greedy = lp.measure_targets(hidden, head, nothing, vocab_size=50)
    assert not logprobs.any()
    assert not greedy.any()

"""Estimators, and the controller against a table worked out by hand."""

from __future__ import annotations

import pytest
import torch

from gptcli.rlhf.kl import KLController, k1, k2, k3


def test_estimators_average_to_the_kl() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    true = (p * (p / q).log()).sum()
    for estimator, tolerance in ((k1, 1e-6), (k3, 1e-6), (k2, 0.005)):
        assert (p * estimator(p.log(), q.log())).sum().item() == pytest.approx(true.item(), abs=tolerance)
    assert (k3(p.log(), q.log()) >= 0).all()


def test_gradients_as_a_loss_are_as_documented() -> None:
    """d/dz of the mean over samples of p: k2's is the KL's; k3's that of KL(q || p); k1's nothing."""
    q = torch.tensor([0.1, 0.6, 0.3]).log()

    def gradient(of) -> torch.Tensor:
        z = torch.tensor([1.0, 0.2, -0.5], requires_grad=True)
        of(z.log_softmax(0)).backward()
        return z.grad

    def as_loss(estimator):  # sampled tokens are given, so the weights p have no gradient
        return gradient(lambda logp: (logp.exp().detach() * estimator(logp, q)).sum())

    forward = gradient(lambda logp: (logp.exp() * (logp - q)).sum())
    backward = gradient(lambda logp: (q.exp() * (q - logp)).sum())
    assert torch.allclose(as_loss(k2), forward, atol=1e-6)
    assert torch.allclose(as_loss(k3), backward, atol=1e-6)
    assert not torch.allclose(forward, backward, atol=0.05)
    assert as_loss(k1).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(6.0, 1.0), (6.6, 1 + 0.1 * 512 / 10_000), (60.0, 1 + 0.2 * 512 / 10_000), (0.0, 1 - 0.2 * 512 / 10_000)],
)
def test_the_controller_follows_its_table(kl: float, factor: float) -> None:
    controller = KLController(0.15, target=6.0, horizon=10_000)
    controller.update(kl, 512)
    assert controller.coef == pytest.approx(0.15 * factor)


def test_without_a_target_the_price_stays() -> None:
    controller = KLController(0.15)
    controller.update(60.0, 512)
    assert controller.coef == 0.15

"""How far the policy is from the reference: estimators from samples, and the controller of their price."""

from __future__ import annotations

from torch import Tensor

# Of KL(policy || reference) from a token that the policy drew (Schulman, "Approximating KL Divergence", 2020). All
# have about the right value; what differs is what training with them does:
#   k1 in the reward         the gradient of the KL of whole responses: the default everywhere
#   k2 as a loss             the gradient of each token's KL, without its effect on later tokens
#   k3 as a loss             the gradient of the other divergence, KL(reference || policy), and so another policy
#   k1 as a loss             no gradient at all on average;  k2, k3 in the reward: the gradient of something else


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Unbiased, and negative where the reference likes the token more."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Unbiased and never negative: good to look at, wrong to train with."""
    back = ref_logprobs - logprobs
    return back.exp() - 1 - back


LOSSES = {"k2": k2, "k3": k3}  # the estimators that are a loss; k1 is taken off the reward


class KLController:
    """The price of a nat; with a target it grows where the KL is above and shrinks where it is below (Ziegler et
    al. 2019, section 2.2)."""

    MOST = 0.2  # relative error that counts

    def __init__(self, coef: float, target: float | None = None, horizon: int = 10_000) -> None:
        self.coef, self._target, self._horizon = coef, target, horizon

    def resume(self, coef: float) -> None:
        """Go on from `coef`, if it is one that moves; a fixed one is what the recipe says now."""
        if self._target is not None:
            self.coef = coef

    def update(self, kl: float, responses: int) -> None:
        """After a rollout of `responses` whose mean KL per response was `kl`."""
        if self._target is None:
            return
        error = min(self.MOST, max(-self.MOST, kl / self._target - 1))
        self.coef *= 1 + error * responses / self._horizon

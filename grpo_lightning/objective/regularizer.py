"""Regularisers: what holds the policy near its reference, and what keeps it uncertain.

Their coefficients are where a run begins. Callbacks may move them, so that the module holds the current ones and hands
them in as `Coefficients`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from grpo_lightning.functional.kl import importance_weighted, k1, k2, k3
from grpo_lightning.objective.settings import require


class KLEstimator(ABC):
    """An estimator of KL(pi_theta || pi_ref) from one sampled token. `functional.kl` says what each gradient is."""

    @abstractmethod
    def __call__(self, logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
        """The estimate at each token."""


@dataclass(frozen=True, kw_only=True)
class K1(KLEstimator):
    """-log x, x = pi_ref / pi_theta. For the reward; in the loss its expected gradient is 0."""

    def __call__(self, logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
        """See `k1`."""
        return k1(logprobs, reference_logprobs)


@dataclass(frozen=True, kw_only=True)
class K2(KLEstimator):
    """(log x)^2 / 2. For the loss: its expected gradient is that of the divergence on-policy."""

    def __call__(self, logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
        """See `k2`."""
        return k2(logprobs, reference_logprobs)


@dataclass(frozen=True, kw_only=True)
class K3(KLEstimator):
    """x - log x - 1 (DeepSeekMath, equation 4). In the loss it has the gradient of the reverse divergence."""

    def __call__(self, logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
        """See `k3`."""
        return k3(logprobs, reference_logprobs)


@dataclass(frozen=True, kw_only=True)
class KLPenalty(ABC):
    """Holds the policy near the reference. Subclass `LossPenalty` or `RewardPenalty`.

    Args:
        coefficient: beta, >= 0, at the start of the run; 0 leaves the reference model out altogether.
        estimator: K1, K2 or K3; of pi_theta over pi_ref in the loss, of pi_old over pi_ref in the reward.
    """

    coefficient: float
    estimator: KLEstimator

    def __post_init__(self) -> None:
        require(self.coefficient >= 0, "kl.coefficient", ">= 0", self.coefficient)


class LossPenalty(KLPenalty):
    """Is subtracted from the objective of each token, and differentiated."""

    @abstractmethod
    def __call__(self, logprobs_BT: Tensor, old_logprobs_BT: Tensor, reference_logprobs_BT: Tensor) -> Tensor:
        """The penalty of each token, before the coefficient."""


class RewardPenalty(KLPenalty):
    """Is taken off the reward before the first update, and so never differentiated."""

    @abstractmethod
    def of_completions(self, penalties_BT: Tensor) -> Tensor | None:
        """What is taken off each completion's total, shape B; None for nothing."""

    @abstractmethod
    def of_tokens(self, penalties_BT: Tensor) -> Tensor | None:
        """What is taken off the reward of each token; None for nothing."""


@dataclass(frozen=True, kw_only=True)
class KLInLoss(LossPenalty):
    """beta * k in the loss (DeepSeekMath, equation 3)."""

    def __call__(self, logprobs_BT: Tensor, old_logprobs_BT: Tensor, reference_logprobs_BT: Tensor) -> Tensor:  # noqa: ARG002 - not weighted
        """The estimate."""
        return self.estimator(logprobs_BT, reference_logprobs_BT)


@dataclass(frozen=True, kw_only=True)
class WeightedKLInLoss(LossPenalty):
    """beta * rho * k in the loss, rho = pi_theta / pi_old of the token (DeepSeek-V3.2).

    https://arxiv.org/abs/2512.02556. With K3 its gradient is that of the divergence also where the completions were
    drawn by an older policy.
    """

    def __call__(self, logprobs_BT: Tensor, old_logprobs_BT: Tensor, reference_logprobs_BT: Tensor) -> Tensor:
        """See `importance_weighted`."""
        return importance_weighted(self.estimator(logprobs_BT, reference_logprobs_BT), logprobs_BT - old_logprobs_BT)


@dataclass(frozen=True, kw_only=True)
class KLInReward(RewardPenalty):
    """beta * sum of k over the completion, off its total reward, before the baseline (RLOO).

    https://arxiv.org/abs/2402.14740
    """

    def of_completions(self, penalties_BT: Tensor) -> Tensor:
        """Their sums."""
        return penalties_BT.sum(dim=1)

    def of_tokens(self, penalties_BT: Tensor) -> None:
        """Nothing."""


@dataclass(frozen=True, kw_only=True)
class KLInReturn(RewardPenalty):
    """beta * k of the token and of those that follow, off its advantage, after the baseline (PPO; REINFORCE++).

    DeepSeekMath, equation 2, as reward to go; REINFORCE++, equations 8 and 9 (https://arxiv.org/abs/2501.03262).
    """

    def of_completions(self, penalties_BT: Tensor) -> None:
        """Nothing."""

    def of_tokens(self, penalties_BT: Tensor) -> Tensor:
        """As they are: the sum over what follows is taken of all rewards of tokens."""
        return penalties_BT


@dataclass(frozen=True, kw_only=True)
class EntropyBonus:
    """coefficient * entropy of the policy at each token, in nats, added to the objective.

    Args:
        coefficient: >= 0, at the start of the run.
    """

    coefficient: float

    def __post_init__(self) -> None:
        require(self.coefficient >= 0, "entropy.coefficient", ">= 0", self.coefficient)

"""Masks: which completions and tokens the update learns from.

Groups without a signal are taken out by the run's `groups`, before anything else.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from grpo_lightning.functional.masks import near_policy_sequences, top_entropy_threshold
from grpo_lightning.objective.settings import require


class Mask(ABC):  # noqa: B024 - its kinds have different methods
    """Takes something out of the update. Subclass one of the three kinds, which act at different times."""


class CompletionMask(Mask):
    """Takes out completions before the first update: they count in their group's statistics, not in the loss."""

    @abstractmethod
    def __call__(self, is_truncated_B: Tensor) -> Tensor:
        """bool, True for the completions to learn from."""


class EntropyMask(Mask):
    """Keeps the policy gradient of tokens by the entropy that the old policy had there."""

    @abstractmethod
    def threshold(self, entropies_N: Tensor) -> Tensor:
        """The least entropy to keep, a scalar, from those of all loss tokens of the global minibatch."""


class UpdateMask(Mask):
    """Takes the policy gradient away from tokens in each update, by where the policy is now."""

    @abstractmethod
    def __call__(
        self, logprobs_BT: Tensor, sampler_logprobs_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor
    ) -> Tensor:
        """bool, True for the tokens to keep; broadcasts to [B, T]."""


@dataclass(frozen=True, kw_only=True)
class TruncatedCompletions(CompletionMask):
    """Nothing is learned from a completion that the length limit cut off (DAPO, section 3.4, overlong filtering).

    https://arxiv.org/abs/2503.14476. It is not counted in the denominators either.
    """

    def __call__(self, is_truncated_B: Tensor) -> Tensor:
        """The others."""
        return ~is_truncated_B


@dataclass(frozen=True, kw_only=True)
class TopEntropyTokens(EntropyMask):
    """The policy gradient of the most uncertain tokens alone (Beyond the 80/20 Rule).

    https://arxiv.org/abs/2506.01939. Every token is counted in the denominators. The quantile is that of the whole
    global minibatch, under the policy at the start of the iteration's updates.

    Args:
        share: The share of tokens to keep, in (0, 1].
    """

    share: float

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, "masks.share", "in (0, 1]", self.share)

    def threshold(self, entropies_N: Tensor) -> Tensor:
        """See `top_entropy_threshold`."""
        return top_entropy_threshold(entropies_N, share=self.share)


@dataclass(frozen=True, kw_only=True)
class OffPolicySequences(UpdateMask):
    """No policy gradient of bad completions that the policy has left behind (DeepSeek-V3.2).

    https://arxiv.org/abs/2512.02556

    Args:
        max_drift: The largest mean of log mu - log pi_theta over the tokens of a completion of negative advantage, > 0.
    """

    max_drift: float

    def __post_init__(self) -> None:
        require(self.max_drift > 0, "masks.max_drift", "> 0", self.max_drift)

    def __call__(
        self, logprobs_BT: Tensor, sampler_logprobs_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor
    ) -> Tensor:
        """See `near_policy_sequences`."""
        return near_policy_sequences(logprobs_BT, sampler_logprobs_BT, advantages_BT, mask_BT, max_drift=self.max_drift)

"""Advantages before their scale: what a completion's rewards are compared with."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from grpo_lightning.functional.advantages import (
    batch_centred,
    group_centred,
    group_normalized_advantages,
    leave_one_out_centred,
    length_weighted_centred,
    pass_at_k_advantages,
    per_reward_normalized,
    uncentred,
)
from grpo_lightning.functional.scales import scaled
from grpo_lightning.objective.settings import check_deviation, require
from grpo_lightning.types import ScoredGroups

ROUNDING = 1e-9
"""A total of weighted rewards that misses a threshold by less than this has reached it."""


class Advantage(ABC):
    """Compares the completions of an iteration. Subclass `OutcomeAdvantage` or `StepAdvantage`."""

    compares_totals: ClassVar[bool]
    """Whether it is a difference of total rewards. Only then can a penalty be taken off the total, and the scale be
    computed from the totals."""


class OutcomeAdvantage(Advantage):
    """One advantage per completion."""

    @abstractmethod
    def __call__(self, groups: ScoredGroups) -> Tensor:
        """Compare the completions of all ranks.

        Returns:
            float64, shape [P, G]; 0 for completions that are not valid.
        """


class StepAdvantage(Advantage):
    """Rewards of single tokens. A token's advantage is the sum of those that follow it, its own included."""

    @abstractmethod
    def __call__(self, scores_PGT: Tensor, is_step_PGT: Tensor) -> Tensor:
        """Compare the steps of this rank's groups; a group is never spread over ranks.

        Args:
            scores_PGT: float64, the score of a step at its last token.
            is_step_PGT: bool, where a step of a valid completion ends.

        Returns:
            float64, shape [P, G, T]; 0 where no step ends.
        """


@dataclass(frozen=True, kw_only=True)
class GroupMean(OutcomeAdvantage):
    """r - mean of the group (DeepSeekMath, section 4.1.2, before the division)."""

    compares_totals: ClassVar[bool] = True

    def __call__(self, groups: ScoredGroups) -> Tensor:
        """See `group_centred`."""
        return group_centred(groups.rewards_PG, groups.valid_PG)


@dataclass(frozen=True, kw_only=True)
class LeaveOneOut(OutcomeAdvantage):
    """r - mean of the group's other completions (RLOO, https://arxiv.org/abs/2402.14740)."""

    compares_totals: ClassVar[bool] = True

    def __call__(self, groups: ScoredGroups) -> Tensor:
        """See `leave_one_out_centred`."""
        return leave_one_out_centred(groups.rewards_PG, groups.valid_PG)


@dataclass(frozen=True, kw_only=True)
class LengthWeightedMean(OutcomeAdvantage):
    """r - mean of the group, weighted by length (OPO, https://arxiv.org/abs/2505.23585)."""

    compares_totals: ClassVar[bool] = True

    def __call__(self, groups: ScoredGroups) -> Tensor:
        """See `length_weighted_centred`."""
        return length_weighted_centred(groups.rewards_PG, groups.valid_PG, groups.lengths_PG)


@dataclass(frozen=True, kw_only=True)
class BatchMean(OutcomeAdvantage):
    """r - mean of the iteration's completions, of all prompts and ranks."""

    compares_totals: ClassVar[bool] = True

    def __call__(self, groups: ScoredGroups) -> Tensor:
        """See `batch_centred`."""
        return batch_centred(groups.rewards_PG, groups.valid_PG)


@dataclass(frozen=True, kw_only=True)
class NoBaseline(OutcomeAdvantage):
    """r itself: plain REINFORCE, or a baseline that is left to the scale (REINFORCE++)."""

    compares_totals: ClassVar[bool] = True

    def __call__(self, groups: ScoredGroups) -> Tensor:
        """See `uncentred`."""
        return uncentred(groups.rewards_PG, groups.valid_PG)


@dataclass(frozen=True, kw_only=True)
class PerReward(OutcomeAdvantage):
    """The weighted sum of the rewards, each normalised in its group (GDPO, https://arxiv.org/abs/2601.05242).

    Args:
        ddof: 0 divides a variance by the number of values, 1 by one less.
        epsilon: Added to a standard deviation, >= 0.
    """

    ddof: int
    epsilon: float
    compares_totals: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_deviation("advantage", self.ddof, self.epsilon)

    def __call__(self, groups: ScoredGroups) -> Tensor:
        """See `per_reward_normalized`."""
        return per_reward_normalized(
            groups.values_PGK, groups.valid_PG, groups.weights_K, ddof=self.ddof, epsilon=self.epsilon
        )


@dataclass(frozen=True, kw_only=True)
class PassAtK(OutcomeAdvantage):
    """The advantage under the reward "any of k is correct" (Pass@k Training, https://arxiv.org/abs/2508.10751).

    Args:
        k: How many attempts count as one, >= 1. A group of fewer valid completions has advantage 0.
        threshold: A completion is correct by a total reward of at least this.
        epsilon: Added to the standard deviation of the reward, >= 0.
    """

    k: int
    threshold: float
    epsilon: float
    compares_totals: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.k >= 1, "advantage.k", ">= 1", self.k)
        require(self.epsilon >= 0, "advantage.epsilon", ">= 0", self.epsilon)

    def __call__(self, groups: ScoredGroups) -> Tensor:
        """See `pass_at_k_advantages`; divided by the deviation."""
        is_correct_PG = groups.rewards_PG >= self.threshold - ROUNDING
        advantages = pass_at_k_advantages(is_correct_PG, groups.valid_PG, k=self.k)
        return scaled(advantages.centred_PG, advantages.deviation_P1 + self.epsilon)


@dataclass(frozen=True, kw_only=True)
class ProcessSupervision(StepAdvantage):
    """The scores of the steps, normalised over all steps of the group (DeepSeekMath, section 4.1.3).

    A token's advantage is the sum over the steps that end at it or later. A reward that returns one number is one step,
    which ends at the last token; what several rewards say of one position is added up.

    Args:
        ddof: 0 divides a variance by the number of values, 1 by one less.
        epsilon: Added to a standard deviation, >= 0.
    """

    ddof: int
    epsilon: float
    compares_totals: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_deviation("advantage", self.ddof, self.epsilon)

    def __call__(self, scores_PGT: Tensor, is_step_PGT: Tensor) -> Tensor:
        """See `group_normalized_advantages`, over the pooled steps."""
        pooled = group_normalized_advantages(
            scores_PGT.flatten(1), is_step_PGT.flatten(1), ddof=self.ddof, epsilon=self.epsilon
        )
        return pooled.view_as(scores_PGT)

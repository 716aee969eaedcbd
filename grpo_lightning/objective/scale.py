"""Scales: what advantages are divided by."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from grpo_lightning.functional.scales import (
    Moments,
    batch_std,
    group_mean,
    group_std,
    pooled,
    signal_share,
)
from grpo_lightning.objective.settings import check_deviation
from grpo_lightning.types import ConfigurationError, ScoredGroups


class Affine(NamedTuple):
    """A becomes (A - shift) / divisor; 0 / 0 is 0. Each broadcasts to [P, G]."""

    shift: Tensor
    divisor: Tensor


class Scale(ABC):
    """Says by what the advantages of each completion are shifted and divided."""

    divides_by_totals: ClassVar[bool]
    """Whether it is computed from the total rewards, and so fits only advantages that compare them."""

    @abstractmethod
    def __call__(self, groups: ScoredGroups, moments: Moments) -> Affine:
        """The scale of the completions of all ranks.

        Args:
            groups: Of all ranks.
            moments: Of the advantages of each completion, over its loss tokens; counts are 0 where it is not valid.
        """


@dataclass(frozen=True, kw_only=True)
class DeviationScale(Scale):
    """Divides by a standard deviation.

    Args:
        ddof: 0 divides a variance by the number of values, 1 by one less.
        epsilon: Added to a standard deviation, >= 0.
    """

    ddof: int
    epsilon: float

    def __post_init__(self) -> None:
        check_deviation("scale", self.ddof, self.epsilon)


@dataclass(frozen=True, kw_only=True)
class GroupStd(DeviationScale):
    """The standard deviation of the group's rewards (DeepSeekMath, section 4.1.2)."""

    divides_by_totals: ClassVar[bool] = True

    def __call__(self, groups: ScoredGroups, moments: Moments) -> Affine:
        """See `group_std`."""
        std_P1 = group_std(groups.rewards_PG, groups.valid_PG, ddof=self.ddof)
        return Affine(_nothing(moments), std_P1 + self.epsilon)


@dataclass(frozen=True, kw_only=True)
class BatchStd(DeviationScale):
    """The standard deviation of all the iteration's rewards (Lite PPO, https://arxiv.org/abs/2508.08221)."""

    divides_by_totals: ClassVar[bool] = True

    def __call__(self, groups: ScoredGroups, moments: Moments) -> Affine:
        """See `batch_std`."""
        return Affine(_nothing(moments), batch_std(groups.rewards_PG, groups.valid_PG, ddof=self.ddof) + self.epsilon)


@dataclass(frozen=True, kw_only=True)
class AdvantageStd(DeviationScale):
    """The standard deviation of all the iteration's advantages, one per completion (ScaleRL).

    https://arxiv.org/abs/2510.13786. Nothing is subtracted.
    """

    divides_by_totals: ClassVar[bool] = False

    def __call__(self, groups: ScoredGroups, moments: Moments) -> Affine:  # noqa: ARG002 - asks the advantages alone
        """See `pooled`."""
        return Affine(_nothing(moments), pooled(_of_completions(moments), ddof=self.ddof).std + self.epsilon)


@dataclass(frozen=True, kw_only=True)
class Whitened(DeviationScale):
    """Mean 0 and standard deviation 1 over the iteration's completions (GDPO).

    https://arxiv.org/abs/2601.05242
    """

    divides_by_totals: ClassVar[bool] = False

    def __call__(self, groups: ScoredGroups, moments: Moments) -> Affine:  # noqa: ARG002 - asks the advantages alone
        """See `pooled`."""
        mean, std = pooled(_of_completions(moments), ddof=self.ddof)
        return Affine(mean, std + self.epsilon)


@dataclass(frozen=True, kw_only=True)
class TokenWhitened(DeviationScale):
    """Mean 0 and standard deviation 1 over the iteration's loss tokens (REINFORCE++, equation 10).

    https://arxiv.org/abs/2501.03262
    """

    divides_by_totals: ClassVar[bool] = False

    def __call__(self, groups: ScoredGroups, moments: Moments) -> Affine:  # noqa: ARG002 - asks the advantages alone
        """See `pooled`."""
        mean, std = pooled(moments, ddof=self.ddof)
        return Affine(mean, std + self.epsilon)


@dataclass(frozen=True, kw_only=True)
class GroupMeanReward(Scale):
    """The mean of the group's rewards, which must be >= 0 (MaxRL, https://arxiv.org/abs/2602.02710)."""

    divides_by_totals: ClassVar[bool] = True

    def __call__(self, groups: ScoredGroups, moments: Moments) -> Affine:
        """See `group_mean`.

        Raises:
            ConfigurationError: A reward is negative.
        """
        lowest = groups.rewards_PG.masked_fill(~groups.valid_PG, 0.0).min()
        if lowest < 0:
            raise ConfigurationError(
                f"model.objective.scale: GroupMeanReward divides by the mean reward of a group and needs rewards >= 0, "
                f"got {lowest:g}."
            )
        return Affine(_nothing(moments), group_mean(groups.rewards_PG, groups.valid_PG))


@dataclass(frozen=True, kw_only=True)
class SignalShare(Scale):
    """The share of completions whose group's rewards differ: 1 / alpha (GPG, https://arxiv.org/abs/2504.02546)."""

    divides_by_totals: ClassVar[bool] = True

    def __call__(self, groups: ScoredGroups, moments: Moments) -> Affine:
        """See `signal_share`."""
        return Affine(_nothing(moments), signal_share(groups.rewards_PG, groups.valid_PG))


def _nothing(moments: Moments) -> Tensor:
    return moments.means_PG.new_zeros(())


def _of_completions(moments: Moments) -> Moments:
    """Every completion counts once, whatever its length."""
    ones_PG = (moments.counts_PG > 0).to(moments.counts_PG.dtype)
    return Moments(ones_PG, moments.means_PG, torch.where(ones_PG > 0, moments.squares_PG / moments.counts_PG, 0.0))

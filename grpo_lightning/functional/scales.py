r"""The scale of advantages: what they are divided by, after the baseline.

A scale is an affine map :math:`A \mapsto (A - s) / d`, of the group or of the whole global batch. Advantages may differ
from token to token, so a completion is summed up by its `Moments`; those of all ranks together give the batch's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_lightning.functional.advantages import batch_centred, group_centred, has_zero_variance


class Moments(NamedTuple):
    """Of each completion's advantages: how many they are, their mean, and their squared differences from it."""

    counts_PG: Tensor
    means_PG: Tensor
    squares_PG: Tensor
    """The sum of the squared differences from the mean."""


class Pooled(NamedTuple):
    """Mean and standard deviation of a batch, both scalars."""

    mean: Tensor
    std: Tensor


def scaled(values: Tensor, divisor: Tensor) -> Tensor:
    """The values divided; 0 stays 0, whatever it is divided by."""
    return torch.where(values == 0, 0.0, values / divisor)


def group_std(rewards_PG: Tensor, valid_PG: Tensor, *, ddof: int) -> Tensor:
    """The standard deviation of each group's valid rewards, shape [P, 1].

    Args:
        rewards_PG: Entries that are not valid may hold anything.
        valid_PG: bool.
        ddof: 0 divides the sum of squares by the number of rewards, 1 by one less (but by 1 at least).

    Source: DeepSeekMath, section 4.1.2 (https://arxiv.org/abs/2402.03300), which does not name ddof.
    """
    freedom_P1 = (valid_PG.sum(dim=1, keepdim=True) - ddof).clamp(min=1)
    return (group_centred(rewards_PG, valid_PG).square().sum(dim=1, keepdim=True) / freedom_P1).sqrt()


def batch_std(rewards_PG: Tensor, valid_PG: Tensor, *, ddof: int) -> Tensor:
    """The standard deviation of all valid rewards of all groups, a scalar.

    Source: Lite PPO (https://arxiv.org/abs/2508.08221).
    """
    freedom = (valid_PG.sum() - ddof).clamp(min=1)
    return (batch_centred(rewards_PG, valid_PG).square().sum() / freedom).sqrt()


def group_mean(rewards_PG: Tensor, valid_PG: Tensor) -> Tensor:
    r"""The mean of each group's valid rewards, shape [P, 1]: the divisor of MaxRL.

    With rewards of 0 and 1, :math:`(r - \bar r)/\bar r` (0 where nothing succeeds) has the expected policy gradient
    :math:`\sum_{k=1}^{G-1} \frac{1}{k} \nabla\,\text{pass@}k`, that of the log-likelihood of success cut off at order
    G - 1.

    Source: Maximum Likelihood Reinforcement Learning (https://arxiv.org/abs/2602.02710).
    """
    known_PG = rewards_PG.masked_fill(~valid_PG, 0.0)
    return known_PG.sum(dim=1, keepdim=True) / valid_PG.sum(dim=1, keepdim=True).clamp(min=1)


def signal_share(rewards_PG: Tensor, valid_PG: Tensor) -> Tensor:
    r""":math:`1/\alpha = (B - M) / B`: the share of the valid completions whose group's rewards differ, a scalar.

    B counts the valid completions of the batch, M those in groups of equal rewards, which add nothing to the gradient
    but are counted in its mean; dividing by the share undoes that.

    Source: GPG (https://arxiv.org/abs/2504.02546).

    Returns:
        0 where no group has a signal.
    """
    has_signal_P1 = ~has_zero_variance(rewards_PG, valid_PG)[:, None]
    return (valid_PG & has_signal_P1).sum() / valid_PG.sum().clamp(min=1).to(rewards_PG.dtype)


def pooled(moments: Moments, *, ddof: int) -> Pooled:
    r"""Mean and standard deviation of all the values that the moments sum up.

    .. math::
        \mu = \frac{\sum_i n_i m_i}{N}, \qquad
        \sigma^2 = \frac{\sum_i \left[ q_i + n_i (m_i - \mu)^2 \right]}{N - \text{ddof}}, \qquad N = \sum_i n_i

    which cancels nothing and, unlike sums of squares, is exact for values that are all equal.

    Args:
        moments: n, m and q of each completion; one with n = 0 is left out.
        ddof: 0 or 1.

    Source: Chan, Golub and LeVeque 1979, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances.
    """
    counts_PG, means_PG = moments.counts_PG, moments.means_PG
    total, is_known_PG = counts_PG.sum(), counts_PG > 0
    means_PG = means_PG.masked_fill(~is_known_PG, 0.0)
    mean = (counts_PG * means_PG).sum() / total.clamp(min=1)
    highest = means_PG.masked_fill(~is_known_PG, float("-inf")).amax()
    lowest = means_PG.masked_fill(~is_known_PG, float("inf")).amin()
    mean = torch.where(highest == lowest, highest, mean)  # rounding would leave equal values a deviation
    squares = moments.squares_PG.masked_fill(~is_known_PG, 0.0) + counts_PG * (means_PG - mean).square()
    return Pooled(mean, (squares.sum() / (total - ddof).clamp(min=1)).sqrt())


def moments_of_constants(values_PG: Tensor, counts_PG: Tensor) -> Moments:
    """The moments of completions whose tokens all have one advantage."""
    return Moments(counts_PG.to(values_PG.dtype), values_PG, torch.zeros_like(values_PG))

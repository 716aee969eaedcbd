"""What is measured of an update, as sums and counts that add up over any split."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_lightning.functional.kl import k3


class SumAndCount(NamedTuple):
    """A mean that has not been divided yet; both scalars, float64."""

    sum: Tensor
    count: Tensor  # type: ignore[assignment]  # a tuple has a method of that name, which nobody asks for here


def over_tokens(values: Mapping[str, Tensor], mask_BT: Tensor) -> dict[str, SumAndCount]:
    """The mean of each over the loss tokens, of numbers or of booleans.

    Args:
        values: By name, of shape [B, T], or [B, 1] where a completion's value counts for each of its tokens.
        mask_BT: bool, the loss tokens.
    """
    count, is_padding_BT = mask_BT.sum().double(), ~mask_BT
    return {
        name: SumAndCount(of_tokens.detach().masked_fill(is_padding_BT, 0).sum(dtype=torch.float64), count)
        for name, of_tokens in values.items()
    }


def drift(logprobs_BT: Tensor, old_logprobs_BT: Tensor) -> Tensor:
    r""":math:`\rho - 1 - \log\rho` of each token: on samples of pi_old its mean is KL(pi_old || pi_theta).

    After a step from pi_old it is about half the mean squared difference of the log-probabilities.
    """
    return k3(old_logprobs_BT, logprobs_BT)


def effective_sample_size(mean_weight: float, mean_squared_weight: float) -> float:
    r""":math:`(\sum w)^2 / (n \sum w^2)`, in (0, 1]: the share of the sample that importance weights leave.

    Args:
        mean_weight: The mean of w.
        mean_squared_weight: The mean of w squared; 0 gives 0.

    Example:
        >>> effective_sample_size(0.5, 0.5)  # every other weight is 0
        0.5
    """
    return mean_weight**2 / mean_squared_weight if mean_squared_weight else 0.0


def standard_deviation(mean: float, mean_square: float) -> float:
    """Of the population, from the first two moments; rounding never makes it complex."""
    return math.sqrt(max(mean_square - mean**2, 0.0))

"""What is measured of an update, as sums and counts that add up over any split."""

import math
from collections.abc import Iterable, Mapping, Sequence
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
        mask_BT: bool, the loss tokens. Of shape [B, 1] the mean is over completions.
    """
    if not values:
        return {}
    stacked_KBT = torch.stack([value.detach().expand_as(mask_BT) for value in _of_one_dtype(values.values())])
    sums_K = stacked_KBT.masked_fill(~mask_BT, 0).sum(dim=(1, 2), dtype=torch.float64)
    count = mask_BT.sum().double()
    return {name: SumAndCount(total, count) for name, total in zip(values, sums_K.unbind(), strict=True)}


def lowest_and_highest(values_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest value of any loss token, float64; plus and minus infinity where there is none."""
    exact_BT = values_BT.detach().double().expand_as(mask_BT)
    infinity = float("inf")
    return exact_BT.masked_fill(~mask_BT, infinity).amin(), exact_BT.masked_fill(~mask_BT, -infinity).amax()


def quantiles(values_N: Tensor, levels: Sequence[float]) -> list[float]:
    """The quantiles of at least one value, interpolated linearly between the two values next to a level's place.

    Example:
        >>> quantiles(torch.tensor([4.0, 1.0, 2.0]), [0.5, 0.75])
        [2.0, 3.0]
    """
    sorted_N = values_N.double().sort().values
    places = torch.tensor(levels, dtype=torch.float64, device=values_N.device) * (len(values_N) - 1)
    below, above = sorted_N[places.floor().long()], sorted_N[places.ceil().long()]
    found: list[float] = (below + (places - places.floor()) * (above - below)).tolist()
    return found


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


def deviation_near_one(mean: float, mean_squared_offset: float) -> float:
    r"""The standard deviation of the population, from :math:`E[x]` and :math:`E[(x - 1)^2]`.

    Ratios and weights are near 1: moments about 0 would leave nothing but rounding of their deviation.
    """
    return math.sqrt(max(mean_squared_offset - (mean - 1) ** 2, 0.0))


def _of_one_dtype(values: Iterable[Tensor]) -> list[Tensor]:
    given = list(values)
    dtype = max((value.dtype for value in given if value.is_floating_point()), key=_precision, default=torch.float32)
    return [value.to(dtype) for value in given]


def _precision(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits

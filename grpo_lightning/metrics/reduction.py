"""Means that do not depend on the split: sums and counts are added up over ranks, and divided once."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_lightning.types import Statistic

SumOverRanks = Callable[[Sequence[float]], list[float]]
"""Adds up each value over all ranks: every rank calls it with equally many values, in the same order."""


class Total(NamedTuple):
    """A `Statistic` over all ranks."""

    sum: float
    count: float  # type: ignore[assignment]  # as for `Statistic`


def mean_of(values: Tensor) -> Statistic:
    """The mean of `values`, numbers or booleans (then it is a share), in fp64."""
    return Statistic(values.double().sum(), torch.tensor(float(len(values)), dtype=torch.float64))


def over_ranks(statistics: Mapping[str, Statistic], sum_over_ranks: SumOverRanks) -> dict[str, Total]:
    """Add up statistics of the same names, in the same order, over all ranks, in one collective."""
    sums = sum_over_ranks([float(value) for statistic in statistics.values() for value in statistic])
    return {name: Total(sums[2 * i], sums[2 * i + 1]) for i, name in enumerate(statistics)}

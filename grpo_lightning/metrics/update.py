"""What an update looked like: the objective's statistics, added up over micro-batches and ranks."""

from collections.abc import Mapping

import torch

from grpo_lightning.functional.statistics import effective_sample_size, standard_deviation
from grpo_lightning.metrics.reduction import SumOverRanks, over_ranks
from grpo_lightning.types import Statistic

NOTHING = Statistic(torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))


class UpdateStatistics:
    """The statistics of the update under way on this rank.

    Every rank adds statistics of the same names: the loss of no samples has them too, with counts of 0.
    """

    def __init__(self) -> None:
        self._so_far: dict[str, Statistic] = {}

    def add(self, statistics: Mapping[str, Statistic]) -> None:
        """Add those of some completions of the minibatch. Nothing waits for the device here."""
        for name, statistic in statistics.items():
            so_far = self._so_far.get(name, NOTHING)
            self._so_far[name] = Statistic(so_far.sum + statistic.sum, so_far.count + statistic.count)

    def take(self, sum_over_ranks: SumOverRanks) -> dict[str, float]:
        """The mean of each over the whole update and all ranks, where there is one; then begin the next update.

        The mean of a square is not reported: that of the ratio gives its deviation, that of the sampler's weights the
        effective sample size.

        Args:
            sum_over_ranks: See `SumOverRanks`; called once.
        """
        totals = over_ranks(dict(sorted(self._so_far.items())), sum_over_ranks)
        self._so_far = {}
        means = {name: total.sum / total.count for name, total in totals.items() if total.count}
        if "policy/ratio_square" in means:
            means["policy/ratio_std"] = standard_deviation(means["policy/ratio"], means.pop("policy/ratio_square"))
        if "sampler/weight_square" in means:
            square = means.pop("sampler/weight_square")
            means["sampler/effective_sample_size"] = effective_sample_size(means["sampler/weight"], square)
        return means

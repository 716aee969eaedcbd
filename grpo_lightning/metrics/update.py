"""What an update looked like: the objective's statistics, added up over micro-batches and ranks."""

from collections.abc import Mapping

import torch

from grpo_lightning.metrics.reduction import SumOverRanks, over_ranks
from grpo_lightning.types import Statistic

EVERY_RANK_HAS = ("policy/entropy", "policy/clip_fraction", "policy/ratio", "policy/kl")
"""Statistics that take part in the sum over ranks even where a rank has no samples, and so none of them. A statistic of
the objective that is missing here is added up as well, but then every rank must have samples in every update."""

NOTHING = Statistic(torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))


class UpdateStatistics:
    """The statistics of the update under way on this rank."""

    def __init__(self) -> None:
        self._so_far: dict[str, Statistic] = {}

    def add(self, statistics: Mapping[str, Statistic]) -> None:
        """Add those of some completions of the minibatch. Nothing waits for the device here."""
        for name, statistic in statistics.items():
            so_far = self._so_far.get(name, NOTHING)
            self._so_far[name] = Statistic(so_far.sum + statistic.sum, so_far.count + statistic.count)

    def take(self, sum_over_ranks: SumOverRanks) -> dict[str, float]:
        """The mean of each over the whole update and all ranks, where there is one; then begin the next update.

        Args:
            sum_over_ranks: See `SumOverRanks`; called once.
        """
        names = [*EVERY_RANK_HAS, *sorted(set(self._so_far) - set(EVERY_RANK_HAS))]
        totals = over_ranks({name: self._so_far.get(name, NOTHING) for name in names}, sum_over_ranks)
        self._so_far = {}
        return {name: total.sum / total.count for name, total in totals.items() if total.count}

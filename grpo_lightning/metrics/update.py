"""What an update looked like: the objective's statistics, put together over micro-batches and ranks."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from grpo_lightning.functional.statistics import deviation_near_one, effective_sample_size, quantiles
from grpo_lightning.metrics.rollout import Gather
from grpo_lightning.types import LossOutput

PERCENT = (10, 50, 90)
"""The quantiles that are logged."""


class UpdateStatistics:
    """The statistics of the update under way on this rank.

    Every rank adds statistics of the same names: the loss of no samples has them too, with counts of 0.
    """

    def __init__(self) -> None:
        self._outputs: list[LossOutput] = []

    def add(self, output: LossOutput) -> None:
        """Add those of some completions of the minibatch. Nothing waits for the device here."""
        self._outputs.append(output._replace(loss=output.loss.detach()))  # a loss with its graph would stay in memory

    def take(self, gather: Gather) -> dict[str, float]:
        """What is logged of the whole update and all ranks; then begin the next update. What has no token is left out.

        Args:
            gather: See `Gather`.
        """
        outputs, self._outputs = self._outputs, []
        if not outputs:
            return {}
        statistics = [output.statistics for output in outputs]
        sums = _reduced([{name: s.sum for name, s in of.items()} for of in statistics], torch.sum, gather)
        counts = _reduced([{name: s.count for name, s in of.items()} for of in statistics], torch.sum, gather)
        means = {name: total / counts[name] for name, total in sums.items() if counts[name]}
        if not any(counts.values()):
            return {}
        return {
            **_reduced([output.parts for output in outputs], torch.sum, gather),
            **with_deviations(means),
            **_reduced([output.lowest for output in outputs], torch.amin, gather),
            **_reduced([output.highest for output in outputs], torch.amax, gather),
            **_quantiles([output.values for output in outputs], gather),
        }


def with_deviations(means: Mapping[str, float]) -> dict[str, float]:
    """The means of `x` and of `x_square`, which is (x - 1)^2, as the mean and the deviation of x.

    Those of the sampler's weights give the effective sample size and chi-square too.
    """
    found = {name: mean for name, mean in means.items() if not name.endswith("_square")}
    for name in [name for name in found if f"{name}_square" in means]:
        mean, offset = means[name], means[f"{name}_square"]
        found[f"{name}_std"] = deviation_near_one(mean, offset)
        square = offset + 2 * mean - 1
        if name == "sampler/weight":
            found["sampler/chi_square"] = offset + 2 * (mean - 1)
            found["sampler/effective_sample_size"] = effective_sample_size(mean, square)
        if name == "sampler/correction":
            found["sampler/correction_effective_sample_size"] = effective_sample_size(mean, square)
    return found


def _reduced(rows: Sequence[Mapping[str, Tensor]], reduce: Callable[..., Tensor], gather: Gather) -> dict[str, float]:
    """Each name's values over all micro-batches and ranks, made one: a sum, a minimum or a maximum."""
    names = sorted(rows[0])
    if not names:
        return {}
    table = torch.stack([torch.stack([row[name].double() for name in names]) for row in rows])
    of_ranks = gather(reduce(table, dim=0)[None])
    return dict(zip(names, reduce(of_ranks, dim=0).tolist(), strict=True))


def _quantiles(rows: Sequence[Mapping[str, Tensor]], gather: Gather) -> dict[str, float]:
    """Exact quantiles over the tokens of the whole minibatch, gathered from all ranks."""
    levels = [percent / 100 for percent in PERCENT]
    found: dict[str, float] = {}
    for name in sorted(rows[0]):
        values_N = torch.cat([row[name] for row in rows]).double()
        all_N = gather(values_N[~values_N.isnan()])
        found |= {f"{name}_p{percent}": q for percent, q in zip(PERCENT, quantiles(all_N, levels), strict=True)}
    return found

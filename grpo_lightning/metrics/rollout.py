"""What an iteration's rollout and its rewards looked like."""

import torch

from grpo_lightning.functional.advantages import has_zero_variance
from grpo_lightning.metrics.reduction import SumOverRanks, mean_of, over_ranks
from grpo_lightning.types import Rewards, Rollout, Statistic


def rollout_metrics(
    rollout: Rollout, rewards: Rewards, sum_over_ranks: SumOverRanks, *, threshold: float
) -> dict[str, float]:
    """The metrics of a rollout over all ranks. A mean of nothing is 0.

    Args:
        rollout: This rank's completions.
        rewards: What the rewards said of them.
        sum_over_ranks: See `SumOverRanks`; called once.
        threshold: A completion is solved by a total of at least this.
    """
    totals = over_ranks(_statistics(rollout, rewards, threshold), sum_over_ranks)
    means = {name: total.sum / max(total.count, 1.0) for name, total in totals.items()}
    variance = means.pop("reward/square") - means["reward/mean"] ** 2
    return {
        **means,
        "reward/std": max(variance, 0.0) ** 0.5,
        "completion/tokens": totals["completion/length_mean"].sum,
    }


def _statistics(rollout: Rollout, rewards: Rewards, threshold: float) -> dict[str, Statistic]:
    """Of this rank: the means that are logged, and those that `rollout_metrics` works others out from."""
    shape_PG = (len(rollout.prompts), rollout.group_size)
    totals_B, valid_B = rewards.totals_B, rewards.valid_B
    known = totals_B[valid_B]
    has_signal_P = ~has_zero_variance(totals_B.view(shape_PG), valid_B.view(shape_PG))
    by_name = zip(rewards.names, rewards.values_BK.unbind(dim=1), strict=True)
    return {
        "reward/mean": mean_of(known),
        "reward/square": mean_of(known.square()),
        "reward/solve_rate": mean_of(totals_B >= threshold),
        "reward/groups_with_signal": mean_of(has_signal_P),
        "reward/failure_ratio": mean_of(rewards.failed_BK.any(dim=1)),
        "completion/length_mean": mean_of(torch.tensor([len(c.token_ids) for c in rollout.completions])),
        "completion/truncation_ratio": mean_of(torch.tensor([c.is_truncated for c in rollout.completions])),
        **{f"reward/{name}/mean": mean_of(values_B[~values_B.isnan()]) for name, values_B in by_name},
    }

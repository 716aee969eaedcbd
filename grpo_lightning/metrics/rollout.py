"""What an iteration's rollout, its rewards and its advantages looked like.

Every rank gathers a row of a few numbers per completion, and computes on the rows of all: no split can enter.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_lightning.functional.advantages import has_zero_variance
from grpo_lightning.functional.statistics import quantiles
from grpo_lightning.types import Rewards, Rollout

Gather = Callable[[Tensor], Tensor]
"""Puts the rows of all ranks under each other. A collective: every rank calls it equally often."""

PASS_RATES = {"none": 0.0, "to_25": 0.25, "to_50": 0.5, "to_75": 0.75, "below_all": 1.0}
"""The bins of the histogram of groups, by the greatest share of right completions in them; below 1 in the last."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The completions of all ranks, group by group."""

    totals_B: Tensor
    valid_B: Tensor
    failed_B: Tensor
    lengths_B: Tensor
    truncated_B: Tensor
    prompt_lengths_B: Tensor
    staleness_B: Tensor
    values_BK: Tensor
    group_size: int
    threshold: float

    @property
    def solved_B(self) -> Tensor:
        """bool; an unknown total is not solved."""
        return self.totals_B >= self.threshold


def rollout_metrics(
    rollout: Rollout, rewards: Rewards, gather: Gather, threshold: float, num_rounds: int, *, version: int
) -> dict[str, float]:
    """The metrics of a rollout over all ranks. A mean of nothing is 0; a minimum, maximum or quantile is left out.

    Args:
        rollout: This rank's completions, at least one.
        rewards: What the rewards said of them.
        gather: See `Gather`; called once.
        threshold: A completion is solved by a total of at least this.
        num_rounds: How often prompts were drawn.
        version: The number of optimizer steps behind the policy that learns from them.
    """
    columns = (
        rewards.totals_B,
        rewards.valid_B,
        rewards.failed_BK.any(dim=1),
        torch.tensor([len(completion.token_ids) for completion in rollout.completions]),
        rollout.is_truncated_B,
        torch.tensor([len(prompt.token_ids) for prompt in rollout.completion_prompts]),
        torch.tensor([version - completion.weight_version for completion in rollout.completions]),
        *rewards.values_BK.unbind(dim=1),
    )
    totals_B, valid_B, failed_B, lengths_B, truncated_B, prompts_B, staleness_B, *values = gather(
        torch.stack([column.double() for column in columns], dim=1)
    ).unbind(dim=1)
    drawn = Drawn(
        totals_B=totals_B,
        valid_B=valid_B.bool(),
        failed_B=failed_B.bool(),
        lengths_B=lengths_B,
        truncated_B=truncated_B.bool(),
        prompt_lengths_B=prompts_B,
        staleness_B=staleness_B,
        values_BK=torch.stack(values, dim=1),
        group_size=rollout.group_size,
        threshold=threshold,
    )
    return {
        **_of_rewards(drawn, rewards.names),
        **_of_groups(drawn),
        "reward/num_rounds": float(num_rounds),
        **_of_lengths(drawn),
        "sampler/staleness": _mean(drawn.staleness_B),
        "sampler/staleness_max": float(drawn.staleness_B.max()),
    }


def learning_metrics(advantages_B: Tensor, learned_B: Tensor, gather: Gather) -> dict[str, float]:
    """What the update gets to learn from, over all ranks.

    Args:
        advantages_B: Of this rank's completions: the mean over their tokens where they differ.
        learned_B: bool, those with a share in the loss.
        gather: See `Gather`; called once.
    """
    table = gather(torch.stack([advantages_B.double(), learned_B.double()], dim=1))
    every_B, learned_B = table[:, 0], table[:, 1].bool()
    shares = {
        "completion/learned_ratio": _mean(learned_B),
        "advantage/nonzero_ratio": _mean(learned_B & (every_B != 0)),
    }
    known = every_B[learned_B]
    if not len(known):
        return shares
    spread = {"min": known.min(), "max": known.max(), "std": known.std(correction=0)}
    return {**shares, **{f"advantage/{name}": float(value) for name, value in spread.items()}}


def _of_rewards(drawn: Drawn, names: tuple[str, ...]) -> dict[str, float]:
    columns = {"reward": drawn.totals_B, **_by_name(drawn, names)}
    moments: dict[str, float] = {}
    for name, values_B in columns.items():
        known = values_B[~values_B.isnan()]
        moments |= {f"{name}/mean": _mean(known), f"{name}/std": _std(known)}
    return {**moments, "reward/solve_rate": _mean(drawn.solved_B), "reward/failure_ratio": _mean(drawn.failed_B)}


def _by_name(drawn: Drawn, names: tuple[str, ...]) -> dict[str, Tensor]:
    return {f"reward/{name}": drawn.values_BK[:, k] for k, name in enumerate(names)}


def _of_groups(drawn: Drawn) -> dict[str, float]:
    totals_PG, valid_PG = drawn.totals_B.view(-1, drawn.group_size), drawn.valid_B.view(-1, drawn.group_size)
    solved_P, known_P = drawn.solved_B.view(-1, drawn.group_size).sum(dim=1), valid_PG.sum(dim=1)
    level_P, is_known_P = has_zero_variance(totals_PG, valid_PG), known_P > 0
    rates = (solved_P / known_P)[is_known_P]
    deviations = [_std(row[valid]) for row, valid in zip(totals_PG, valid_PG, strict=True) if valid.any()]
    upper = list(PASS_RATES.values())
    bins = torch.bucketize(rates, rates.new_tensor(upper)).where(rates < 1, len(upper))
    histogram = {name: _mean(bins == i) for i, name in enumerate([*PASS_RATES, "all"])}
    return {
        "reward/group_std": _mean(torch.tensor(deviations)),
        "reward/groups_with_signal": _mean(~level_P),
        "reward/groups_all_right": _mean(level_P & is_known_P & (solved_P == known_P)),
        "reward/groups_all_wrong": _mean(level_P & is_known_P & (solved_P == 0)),
        **{f"reward/pass_rate/{name}": share for name, share in histogram.items()},
    }


def _of_lengths(drawn: Drawn) -> dict[str, float]:
    lengths_B, valid_B, solved_B = drawn.lengths_B, drawn.valid_B, drawn.solved_B
    terminated = lengths_B[~drawn.truncated_B]
    return {
        "completion/tokens": float(lengths_B.sum()),
        "completion/length_mean": _mean(lengths_B),
        "completion/length_min": float(lengths_B.min()),
        "completion/length_max": float(lengths_B.max()),
        "completion/length_p95": quantiles(lengths_B, [0.95])[0],
        "completion/truncation_ratio": _mean(drawn.truncated_B),
        **_spread("completion/terminated_length", terminated),
        **_mean_if_any("completion/right_length_mean", lengths_B[solved_B]),
        **_mean_if_any("completion/wrong_length_mean", lengths_B[valid_B & ~solved_B]),
        "prompt/length_mean": _mean(drawn.prompt_lengths_B),
    }


def _spread(name: str, values: Tensor) -> dict[str, float]:
    if not len(values):
        return {}
    return {f"{name}_mean": _mean(values), f"{name}_min": float(values.min()), f"{name}_max": float(values.max())}


def _mean_if_any(name: str, values: Tensor) -> dict[str, float]:
    return {name: _mean(values)} if len(values) else {}


def _mean(values: Tensor) -> float:
    """Of numbers or booleans; 0 of nothing."""
    return float(values.double().mean()) if len(values) else 0.0


def _std(values: Tensor) -> float:
    """Of the population; 0 of nothing."""
    return float(values.std(correction=0)) if len(values) else 0.0

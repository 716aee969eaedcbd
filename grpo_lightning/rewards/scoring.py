"""From reward callbacks to one table of rewards: a column each, failures told from scores."""

import logging
import math
import traceback
from collections.abc import Sequence

import torch
from lightning.pytorch.callbacks import Callback

from grpo_lightning.rewards.callback import RewardCallback
from grpo_lightning.types import Completion, ConfigurationError, Prompt, Rewards, Score, StepScores

_log = logging.getLogger(__name__)


class RewardFailure(RuntimeError):
    """Too many completions could not be scored for training to go on."""


def find_rewards(callbacks: Sequence[Callback]) -> list[RewardCallback]:
    """The reward callbacks among the Trainer's callbacks.

    Raises:
        ConfigurationError: There is none, or two have one name.
    """
    rewards = [callback for callback in callbacks if isinstance(callback, RewardCallback)]
    if not rewards:
        raise ConfigurationError(
            "trainer.callbacks has no reward: add at least one, for instance `- class_path: ExactAnswer`."
        )
    names = [reward.name for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(f"trainer.callbacks has two rewards named {name!r}: give one another `name`.")
    return rewards


def score_rollout(
    rewards: Sequence[RewardCallback], prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> Rewards:
    """Ask every reward about every completion.

    A reward that raises, or returns NaN or an infinity, has failed on the completions in question: they take no part in
    their group. A reward that returns something that is no list of scores is a mistake of its author.

    Raises:
        ConfigurationError: A reward returned a wrong number of values, or a value that is no score.
    """
    columns = [_column(reward, prompts, completions) for reward in rewards]
    values = [[math.nan if not _is_number(v) else v for v in map(_total, column)] for column in columns]
    failed = [[v is not None and not _is_number(v) for v in map(_total, column)] for column in columns]
    return Rewards(
        names=tuple(reward.name for reward in rewards),
        weights=tuple(reward.weight for reward in rewards),
        values_BK=torch.tensor(values, dtype=torch.float64).T.reshape(len(completions), len(rewards)),
        failed_BK=torch.tensor(failed, dtype=torch.bool).T.reshape(len(completions), len(rewards)),
        steps={
            reward.name: [score if isinstance(score, StepScores) else None for score in column]
            for reward, column in zip(rewards, columns, strict=True)
            if any(isinstance(score, StepScores) for score in column)
        },
    )


def check_failure_rate(names: Sequence[str], num_failed: Sequence[float], count: float, limit: float) -> None:
    """Stop a run whose rewards are broken.

    Args:
        names: Of the rewards.
        num_failed: Failures of each reward, over all ranks.
        count: Completions, over all ranks.
        limit: Largest share of failures to go on with.

    Raises:
        RewardFailure: A reward failed more often.
    """
    for name, failures in zip(names, num_failed, strict=True):
        if failures > limit * count:
            raise RewardFailure(
                f"The reward {name!r} failed on {failures:.0f} of {count:.0f} completions, more than "
                f"model.max_failure_rate = {limit:g} allows. Its first error is in the log above."
            )


def _column(
    reward: RewardCallback, prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> Sequence[Score]:
    if not completions:
        return []
    try:
        scores = reward.score(prompts, completions)
    except ConfigurationError:
        raise
    except Exception:
        _show_once(reward, traceback.format_exc())
        return [math.nan] * len(completions)
    if isinstance(scores, str) or not hasattr(scores, "__len__") or len(scores) != len(completions):
        got = f"{len(scores)} values" if hasattr(scores, "__len__") and not isinstance(scores, str) else repr(scores)
        raise ConfigurationError(
            f"The reward {reward.name!r} ({type(reward).__name__}) must return {len(completions)} scores, one per "
            f"completion, got {got[:80]}."
        )
    return [_checked(reward, score, completion) for score, completion in zip(scores, completions, strict=True)]


def _checked(reward: RewardCallback, score: Score, completion: Completion) -> Score:
    if isinstance(score, StepScores):
        ends = score.end_positions
        is_inside = all(0 <= end < len(completion.token_ids) for end in ends)
        if len(ends) != len(score.scores) or list(ends) != sorted(set(ends)) or not is_inside:
            raise ConfigurationError(
                f"The reward {reward.name!r} must end its steps at increasing positions inside the completion of "
                f"{len(completion.token_ids)} tokens, one per score, got {ends}."
            )
        return score
    if score is None:
        return None
    try:
        return float(score) if not isinstance(score, str) else _refuse(reward, score)
    except (TypeError, ValueError):
        return _refuse(reward, score)


def _refuse(reward: RewardCallback, score: object) -> Score:
    raise ConfigurationError(
        f"The reward {reward.name!r} ({type(reward).__name__}) must return numbers, StepScores or None, got {score!r}."
    )


def _total(score: Score) -> float | None:
    return sum(score.scores) if isinstance(score, StepScores) else score


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _show_once(reward: RewardCallback, text: str) -> None:
    if not getattr(reward, "_has_shown_failure", False):
        reward._has_shown_failure = True  # type: ignore[attr-defined]
        _log.warning("The reward %r failed; further failures are only counted.\n%s", reward.name, text)

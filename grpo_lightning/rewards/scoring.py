"""From the Trainer's callbacks to the rewards of a rollout, with failures told apart from low scores.

====================================  ==========================================================
A reward says                         of that completion
====================================  ==========================================================
a finite number                       its value
`StepScores`                          its value is the sum of the steps' scores
None                                  the reward does not apply; the others decide
NaN, more than 1e30, or raises        the reward failed: the completion takes no part in the update
====================================  ==========================================================

A string, or a wrong number of values, is a mistake in the reward function. It stops the run at once, because no
completion could be scored rightly.
"""

import itertools
import math
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from grpo_lightning.rewards.callback import RewardCallback
from grpo_lightning.rewards.first_failure import summarize
from grpo_lightning.types import Completion, ConfigurationError, Prompt, Rewards, Score, StepScores

LARGEST_SCORE = 1e30
"""Of a score's magnitude: up to here sums and squares are finite, and so are advantages in single precision."""


class RewardFailureError(ConfigurationError):
    """A reward failed on so many completions that training on the rest would mean little."""


def find_rewards(callbacks: Sequence[object]) -> list[RewardCallback]:
    """The reward callbacks among the Trainer's `callbacks`, in their order.

    Raises:
        ConfigurationError: There is none, or two have one name.
    """
    rewards = [callback for callback in callbacks if isinstance(callback, RewardCallback)]
    if not rewards:
        raise ConfigurationError(
            "trainer.callbacks must name at least one reward, got none.\n"
            "For instance: `--trainer.callbacks+=ExactAnswer`, or FunctionReward with your own function."
        )
    by_name: dict[str, RewardCallback] = {}
    for reward in rewards:
        other = by_name.setdefault(reward.name, reward)
        if other is not reward:
            raise ConfigurationError(
                f"trainer.callbacks: {type(other).__name__} and {type(reward).__name__} are both named "
                f"{reward.name!r}. Give one of them another `name`."
            )
    return rewards


def score_rollout(
    rewards: Sequence[RewardCallback], prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> Rewards:
    """Score `completions` with every reward; `prompts[i]` is the prompt of `completions[i]`.

    Each reward is called once with all completions of this rank. When that call raises, a `pointwise` reward is
    asked again for each completion by itself, so that which completions fail does not depend on which others were
    scored with them, nor on how they are spread over ranks.

    Raises:
        ConfigurationError: A reward returned a wrong number of values, or values that are no scores.
    """
    values_BK = torch.full((len(completions), len(rewards)), math.nan, dtype=torch.float64)
    failed_BK = torch.zeros((len(completions), len(rewards)), dtype=torch.bool)
    steps: dict[str, Sequence[StepScores | None]] = {}
    for k, reward in enumerate(rewards):
        scores = _scores(reward, prompts, completions)
        values = [_value(reward, score, completion) for score, completion in zip(scores, completions, strict=True)]
        values_BK[:, k] = torch.tensor(values, dtype=torch.float64)
        is_asked_B = torch.tensor([score is not None for score in scores], dtype=torch.bool)
        failed_BK[:, k] = is_asked_B & values_BK[:, k].isnan()
        if any(isinstance(score, StepScores) for score in scores):
            steps[reward.name] = tuple(score if isinstance(score, StepScores) else None for score in scores)
    return Rewards(
        names=tuple(reward.name for reward in rewards),
        weights=tuple(reward.weight for reward in rewards),
        values_BK=values_BK,
        failed_BK=failed_BK,
        steps=steps,
    )


def check_failure_rate(
    rewards: Sequence[RewardCallback], failed_counts: Sequence[float], count: float, max_failure_rate: float
) -> None:
    """Stop the run when a reward failed too often.

    Args:
        rewards: The K rewards.
        failed_counts: Per reward, on how many completions it failed, over all ranks.
        count: The number of completions scored, over all ranks.
        max_failure_rate: The largest share of failures to go on with, in [0, 1].

    Raises:
        RewardFailureError: A reward's share is larger; the message has the place of its first failure.
        ConfigurationError: `max_failure_rate` is no share.
    """
    check_max_failure_rate(max_failure_rate)
    for reward, failed in zip(rewards, failed_counts, strict=True):
        if failed > max_failure_rate * count:
            first = summarize(reward.first_failure) if reward.first_failure else "On another rank: see its log."
            raise RewardFailureError(
                f"{reward} failed on {failed:g} of {count:g} completions ({failed / count:.1%}); "
                f"model.max_failure_rate allows {max_failure_rate:.1%}. The first failure was:\n{first}"
            )


def check_max_failure_rate(max_failure_rate: float) -> None:
    """The limit is a share.

    Raises:
        ConfigurationError: It is not in [0, 1].
    """
    if not 0 <= max_failure_rate <= 1:
        raise ConfigurationError(f"model.max_failure_rate must be in [0, 1], got {max_failure_rate}.")


def expect_list(reward: RewardCallback, scores: object, count: int) -> list[Any]:
    """`scores` as a list of `count` values, unchecked.

    Raises:
        ConfigurationError: It is no list, or has another length.
    """
    if not isinstance(scores, Iterable) or isinstance(scores, str | bytes | Mapping | set | StepScores):
        raise ConfigurationError(f"{reward} must return a list of {count} scores, got {_describe(scores)}.")
    values = list(scores)
    if len(values) != count:
        raise ConfigurationError(
            f"{reward} must return one score per completion: expected {count} values, got {len(values)}."
        )
    return values


def _scores(
    reward: RewardCallback, prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> list[Score | object]:
    """What `reward` says of each completion, unchecked; NaN where it raised."""
    try:
        return expect_list(reward, reward.score(prompts, completions), len(completions))
    except ConfigurationError:
        raise
    except Exception:
        reward.report_failure(traceback.format_exc())
    if not reward.pointwise or len(completions) == 1:
        return [math.nan] * len(completions)
    pairs = zip(prompts, completions, strict=True)
    return [_scores(reward, [prompt], [completion])[0] for prompt, completion in pairs]


def _value(reward: RewardCallback, score: object, completion: Completion) -> float:
    """The number that stands for `score`; NaN where it is None or a failure."""
    if score is None:
        return math.nan
    value = _sum_of_steps(reward, score, completion) if isinstance(score, StepScores) else _number(reward, score)
    if _is_usable(value):
        return value
    reward.report_failure(f"It returned {value} for the completion {completion.text[:200]!r}.")
    return math.nan


def _number(reward: RewardCallback, score: object) -> float:
    """`score` as a float: Python's, NumPy's and one-element tensors' numbers are all accepted."""
    if not isinstance(score, str | bytes):
        try:
            return float(score)  # type: ignore[arg-type]  # whatever converts is welcome, the rest is reported
        except OverflowError:  # a whole number beyond every float
            return math.inf
        except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several elements
            pass
    raise ConfigurationError(
        f"{reward} must return a number, StepScores or None for each completion, got {_describe(score)}."
    )


def _sum_of_steps(reward: RewardCallback, steps: StepScores, completion: Completion) -> float:
    """The sum of the scores of `steps`, whose end positions must be increasing and inside the completion."""
    ends = list(steps.end_positions)
    length = len(completion.token_ids)
    increasing = all(before < after for before, after in itertools.pairwise(ends))
    if not ends or len(steps.scores) != len(ends) or not increasing or ends[0] < 0 or ends[-1] >= length:
        raise ConfigurationError(
            f"{reward} must return StepScores with one increasing end position in 0..{length - 1} per score\n"
            f"(the completion has {length} tokens), or None where there are no steps, got {_describe(steps)}."
        )
    scores = [_number(reward, score) for score in steps.scores]
    unusable = next((score for score in scores if not _is_usable(score)), None)
    return math.fsum(scores) if unusable is None else unusable


def _is_usable(value: float) -> bool:
    return abs(value) <= LARGEST_SCORE  # False for NaN


def _describe(value: object) -> str:
    """`value` and its type, short enough for an error message."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"

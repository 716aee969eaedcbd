"""What the outcomes of isolated calls mean as scores."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from grpo_lightning.rewards.callback import RewardCallback
from grpo_lightning.rewards.isolation import CallResult, CallStatus, FunctionSource, WorkerPool
from grpo_lightning.rewards.scoring import expect_list
from grpo_lightning.types import ConfigurationError, Score


class IsolatedScoring:
    """A scoring function in worker processes: it returned its scores, or it failed, or its time was over.

    Args:
        source: The function, which takes keyword arguments and returns a list of scores.
        timeout_seconds: Deadline of each call; None for none.
        on_timeout: ``exclude`` makes a timeout a failure; a number is the score of what it was called for.
        num_workers: How many calls run at a time.

    Raises:
        ConfigurationError: A setting is out of its range.
    """

    def __init__(
        self,
        source: FunctionSource,
        *,
        timeout_seconds: float | None,
        on_timeout: Literal["exclude"] | float,
        num_workers: int,
    ) -> None:
        if on_timeout != "exclude" and (isinstance(on_timeout, str) or not math.isfinite(on_timeout)):
            raise ConfigurationError(f"A reward's `on_timeout` must be 'exclude' or a number, got {on_timeout!r}.")
        if on_timeout != "exclude" and timeout_seconds is None:
            raise ConfigurationError("A reward's `on_timeout` needs `timeout_seconds`, got null.")
        self._on_timeout = math.nan if on_timeout == "exclude" else float(on_timeout)
        self._pool = WorkerPool(source, timeout_seconds=timeout_seconds, num_workers=num_workers)

    def score_each(self, reward: RewardCallback, calls: Sequence[Mapping[str, Any]]) -> list[Score]:
        """The one score that each of `calls` gives."""
        results = self._pool.map([((), call) for call in calls])
        return [self._scores(reward, result, 1)[0] for result in results]

    def score_batch(self, reward: RewardCallback, call: Mapping[str, Any], count: int) -> Sequence[Score]:
        """The `count` scores that one call gives together."""
        return self._scores(reward, self._pool.map([((), call)])[0], count)

    def close(self) -> None:
        """End the processes."""
        self._pool.close()

    def _scores(self, reward: RewardCallback, result: CallResult, count: int) -> Sequence[Score]:
        """The scores of one call, NaN for a failure; `reward` shows the first."""
        if result.status is CallStatus.RETURNED:
            return expect_list(reward, result.value, count)
        value = self._on_timeout if result.status is CallStatus.TIMED_OUT else math.nan
        if math.isnan(value):
            reward.report_failure(result.error or result.status.value)
        return [value] * count

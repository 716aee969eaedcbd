"""The contract of a reward: a Lightning callback with a name, a weight and a `score`."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from grpo_lightning.types import Completion, ConfigurationError, Prompt, Score

logger = logging.getLogger(__name__)


class RewardCallback(Callback, ABC):
    """Scores completions. Each reward callback of the Trainer is one column of the rewards.

    Subclass it, implement `score`, and name the class under `trainer.callbacks`::

        class Brevity(RewardCallback):
            def score(self, prompts, completions):
                return [-len(completion.token_ids) / 100 for completion in completions]

    Args:
        name: Unique among the run's rewards; metrics are logged as ``reward/<name>/...``.
        weight: Factor of this reward in a completion's total. 0 logs the reward without training on it.

    Raises:
        ConfigurationError: `name` is empty or has a '/', or `weight` is not finite.
    """

    pointwise: bool = True
    """Whether a completion's score depends on that completion and its prompt alone. Then, when `score` raises, each
    completion is scored by itself, so that the one that made it raise does not take the others with it. Set it to
    False in a reward that compares completions (diversity, relative length): the whole batch then fails together."""

    first_failure: str | None = None
    """The traceback of this reward's first failure in this process."""

    def __init__(self, name: str, weight: float = 1.0) -> None:
        super().__init__()
        if not name or "/" in name:
            raise ConfigurationError(f"A reward's `name` must be non-empty and without '/', got {name!r}.")
        if not math.isfinite(weight):
            raise ConfigurationError(f"{type(self).__name__}.weight must be finite, got {weight}.")
        self.name = name
        self.weight = weight

    @property
    def state_key(self) -> str:
        """Tells two rewards of one class apart in a checkpoint."""
        return f"{type(self).__qualname__}[{self.name}]"

    @abstractmethod
    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[Score]:
        """Score each completion of `completions`; `prompts[i]` is the prompt of `completions[i]`.

        Returns:
            One score per completion, in order. None: this reward does not apply to it. NaN or an exception: a
            failure, which excludes the completion from its group's statistics and from the update.
        """

    def answer(self, completion: Completion) -> str | None:
        """The final answer that `completion` gives, for majority voting; None where it gives none.

        Two completions vote for the same answer when the strings are equal.
        """
        return completion.text.strip() or None

    def close(self) -> None:
        """Give back what the reward holds (processes, connections). `score` may be called again after it."""

    def read_column(self, prompt: Prompt, column: str) -> Any:
        """The value of `column` in the data row of `prompt`.

        Raises:
            ConfigurationError: The row has no such column.
        """
        if column not in prompt.columns:
            row = prompt.place or f"row {prompt.index} of the data"
            present = ", ".join(map(repr, prompt.columns)) or "none"
            raise ConfigurationError(
                f"{self} reads the column {column!r}, which {row} does not have.\n"
                f"Columns there: {present}. Map one to {column!r} under `data`, or change the reward's settings."
            )
        return prompt.columns[column]

    def report_failure(self, error: str) -> None:
        """Keep and show `error`, the traceback of a failed completion, if it is the first. The others are counted."""
        if self.first_failure is None:
            self.first_failure = error.strip()
            logger.warning(
                "%s failed. The completions it failed on take no part in the update; further failures are only "
                "counted. The first was:\n%s",
                self,
                self.first_failure,
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002 - Lightning's signature
        """Close the reward when a stage ends."""
        self.close()

    def on_exception(  # Lightning's signature
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        exception: BaseException,  # noqa: ARG002
    ) -> None:
        """Close the reward when a run breaks: Lightning calls no `teardown` then."""
        self.close()

    def __str__(self) -> str:
        return f"The reward {self.name!r} ({type(self).__name__})"

"""Reward: a penalty that grows as a completion nears the length limit."""

import logging
from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer

from grpo_lightning.rewards import RewardCallback
from grpo_lightning.types import Completion, ConfigurationError, Prompt, Score

logger = logging.getLogger(__name__)


class SoftOverlong(RewardCallback):
    r"""DAPO's soft overlong punishment, to be added to a correctness reward.

    With \|y\| the number of tokens of the completion, L = `max_length` and C = `cache_length`::

        r(y) = 0                    if           |y| <= L - C
             = ((L - C) - |y|) / C  if L - C  <  |y| <= L
             = -1                   if L      <  |y|

    Source: DAPO (https://arxiv.org/abs/2503.14476), equation 13; there L = 20480, C = 4096 and the correctness reward
    is +1 or -1.

    Args:
        max_length: L, in tokens: where the penalty is full. Usually `model.sampling.max_new_tokens`.
        cache_length: C, in tokens, in 1..`max_length`: over how many tokens it grows.
        name: The reward's name.
        weight: Factor of this reward in a completion's total.

    Raises:
        ConfigurationError: `cache_length` is not in 1..`max_length`.

    Example:
        >>> SoftOverlong(max_length=20480, cache_length=4096).penalty(18432)
        -0.5
    """

    def __init__(self, max_length: int, cache_length: int, name: str = "soft_overlong", weight: float = 1.0) -> None:
        super().__init__(name, weight)
        if not 1 <= cache_length <= max_length:
            raise ConfigurationError(
                f"SoftOverlong.cache_length must be in 1..max_length = {max_length}, got {cache_length}."
            )
        self.max_length = max_length
        self.cache_length = cache_length

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Say so when no completion can get long enough to be penalised."""
        sampling = getattr(pl_module, "sampling", None)
        free_length = self.max_length - self.cache_length
        if sampling is not None and sampling.max_new_tokens <= free_length:
            logger.warning(
                "%s has no effect: it starts above max_length - cache_length = %d tokens, and "
                "model.sampling.max_new_tokens is %d.",
                self,
                free_length,
                sampling.max_new_tokens,
            )

    def penalty(self, length: int) -> float:
        """The score of a completion of `length` tokens, in [-1, 0]."""
        free_length = self.max_length - self.cache_length
        if length <= free_length:
            return 0.0
        if length <= self.max_length:
            return (free_length - length) / self.cache_length
        return -1.0

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Score]:  # noqa: ARG002
        """The penalty of each completion."""
        return [self.penalty(len(completion.token_ids)) for completion in completions]

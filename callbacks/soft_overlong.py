"""Reward: a penalty that grows towards the length limit."""

from collections.abc import Sequence

from grpo_lightning.rewards import RewardCallback
from grpo_lightning.types import Completion, ConfigurationError, Prompt


class SoftOverlong(RewardCallback):
    r"""DAPO's soft overlong punishment, of the completion's length \|y\| in tokens.

    0 up to ``max_length - cache_length``, then falling linearly to -1 at ``max_length``, and -1 beyond.

    Args:
        max_length: L_max, in tokens.
        cache_length: L_cache, the tokens over which the penalty grows, in (0, max_length].
        name: Of the reward.
        weight: Factor of this reward in a completion's total.

    Source: DAPO, equation 13 (https://arxiv.org/abs/2503.14476).
    """

    def __init__(self, max_length: int, cache_length: int, name: str = "soft_overlong", weight: float = 1.0) -> None:
        super().__init__(name=name, weight=weight)
        if not 0 < cache_length <= max_length:
            raise ConfigurationError(
                f"SoftOverlong.cache_length must be in (0, max_length = {max_length}], got {cache_length}."
            )
        self.max_length = max_length
        self.cache_length = cache_length

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:  # noqa: ARG002
        """Look at lengths alone."""
        return [self.penalty(len(completion.token_ids)) for completion in completions]

    def penalty(self, length: int) -> float:
        """R_length of a completion of `length` tokens."""
        return min(0.0, max(-1.0, (self.max_length - self.cache_length - length) / self.cache_length))

"""Advantage estimators."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from grpo_lightning.functional.advantages import group_normalized_advantages
from grpo_lightning.types import ConfigurationError


class Advantage(ABC):
    """Turns the rewards of groups into advantages."""

    @abstractmethod
    def __call__(self, rewards_PG: Tensor, valid_PG: Tensor) -> Tensor:
        """One advantage per completion; 0 for completions that are not valid."""


@dataclass(frozen=True, kw_only=True)
class GroupNormalized(Advantage):
    """(r - mean) / (std + epsilon) within the group (DeepSeekMath, section 4.1.2).

    Args:
        ddof: 0 divides the variance by G, 1 by G - 1.
        epsilon: Added to the standard deviation.
    """

    ddof: int
    epsilon: float

    def __post_init__(self) -> None:
        if self.ddof not in (0, 1):
            raise ConfigurationError(f"model.objective.advantage.ddof must be 0 or 1, got {self.ddof}.")
        if not self.epsilon >= 0:
            raise ConfigurationError(f"model.objective.advantage.epsilon must be >= 0, got {self.epsilon}.")

    def __call__(self, rewards_PG: Tensor, valid_PG: Tensor) -> Tensor:
        """See `group_normalized_advantages`."""
        return group_normalized_advantages(rewards_PG, valid_PG, ddof=self.ddof, epsilon=self.epsilon)

"""Surrogates: how probability ratio and advantage make a token's objective."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from grpo_lightning.functional.ratios import finite_exp
from grpo_lightning.functional.surrogates import clipped_surrogate
from grpo_lightning.types import ConfigurationError


class Surrogate(ABC):
    """The objective of each token, to be maximised."""

    @abstractmethod
    def __call__(
        self, logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_BT: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective of each token, and statistics of each token by metric name."""


@dataclass(frozen=True, kw_only=True)
class Clipped(Surrogate):
    """min[rho A, clip(rho, 1 - clip_low, 1 + clip_high) A] (PPO, equation 7; DeepSeekMath, equation 3).

    Args:
        clip_low: How far the ratio may fall below 1, in (0, 1].
        clip_high: How far the ratio may rise above 1, > 0.
    """

    clip_low: float
    clip_high: float

    def __post_init__(self) -> None:
        if not 0 < self.clip_low <= 1:
            raise ConfigurationError(f"model.objective.surrogate.clip_low must be in (0, 1], got {self.clip_low}.")
        if not self.clip_high > 0:
            raise ConfigurationError(f"model.objective.surrogate.clip_high must be > 0, got {self.clip_high}.")

    def __call__(
        self, logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_BT: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `clipped_surrogate`."""
        log_ratios_BT = logprobs_BT - old_logprobs_BT
        surrogate = clipped_surrogate(log_ratios_BT, advantages_BT, clip_low=self.clip_low, clip_high=self.clip_high)
        return surrogate.values_BT, {
            "policy/clip_fraction": surrogate.is_clipped_low_BT | surrogate.is_clipped_high_BT,
            "policy/ratio": finite_exp(log_ratios_BT),
        }

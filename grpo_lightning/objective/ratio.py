"""Ratios: of what the probability is compared, a token's or a completion's."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grpo_lightning.functional.ratios import sequence_mean, sequence_sum, sequence_value_token_gradient


class Ratio(ABC):
    """Makes the log-ratios that the surrogate sees from those of the tokens."""

    is_per_token: ClassVar[bool]
    """Whether every token has a gradient of its own, which a mask can end and an advantage of its own can weigh."""

    @abstractmethod
    def __call__(self, log_ratios_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Log-ratios of shape [B, T], or [B, 1] where a completion has one."""


@dataclass(frozen=True, kw_only=True)
class TokenRatio(Ratio):
    """Of each token (PPO; DeepSeekMath, equation 3)."""

    is_per_token: ClassVar[bool] = True

    def __call__(self, log_ratios_BT: Tensor, mask_BT: Tensor) -> Tensor:  # noqa: ARG002 - tokens by themselves
        """As they come."""
        return log_ratios_BT


@dataclass(frozen=True, kw_only=True)
class GeometricRatio(Ratio):
    """Of the completion, to the power 1/|o|: the geometric mean of its tokens' (GSPO, equation 7)."""

    is_per_token: ClassVar[bool] = False

    def __call__(self, log_ratios_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """See `sequence_mean`."""
        return sequence_mean(log_ratios_BT, mask_BT)


@dataclass(frozen=True, kw_only=True)
class GeometricTokenRatio(Ratio):
    """The value of `GeometricRatio` with the gradient of each token (GSPO-token, equation 14)."""

    is_per_token: ClassVar[bool] = True

    def __call__(self, log_ratios_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """See `sequence_value_token_gradient`."""
        return sequence_value_token_gradient(log_ratios_BT, mask_BT)


@dataclass(frozen=True, kw_only=True)
class ProductRatio(Ratio):
    """Of the whole completion: the product of its tokens', whatever its length."""

    is_per_token: ClassVar[bool] = False

    def __call__(self, log_ratios_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """See `sequence_sum`."""
        return sequence_sum(log_ratios_BT, mask_BT)


@dataclass(frozen=True, kw_only=True)
class NoRatio(Ratio):
    """Every ratio is 1: the completions count as drawn by the policy itself."""

    is_per_token: ClassVar[bool] = True

    def __call__(self, log_ratios_BT: Tensor, mask_BT: Tensor) -> Tensor:  # noqa: ARG002 - nothing to look at
        """Zeros."""
        return torch.zeros_like(log_ratios_BT)

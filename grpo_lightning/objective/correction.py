"""Corrections: what is done about completions whose sampler is not quite the trainer's policy.

The axis has one part, so that nothing is corrected twice: either weights beside the surrogate (the decoupled form,
in which the ratio is measured against the trainer's old policy), or the ratio itself.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from grpo_lightning.functional.corrections import masked_weights, truncated_weights
from grpo_lightning.functional.ratios import finite_exp
from grpo_lightning.objective.ratio import GeometricRatio, ProductRatio, Ratio, TokenRatio
from grpo_lightning.objective.settings import name, require

LEVELS = (TokenRatio, GeometricRatio, ProductRatio)


class Correction(ABC):  # noqa: B024 - its kinds have different methods
    """Makes up for pi_old / mu, the trainer's old policy over the sampler. Subclass `WeightedCorrection`."""


class WeightedCorrection(Correction):
    """Multiplies the surrogate by a weight, which is a constant of the update."""

    @abstractmethod
    def __call__(self, log_weights_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Detached weights of shape [B, T], or [B, 1] where a completion has one.

        Args:
            log_weights_BT: log pi_old - log mu of each token.
            mask_BT: bool, the loss tokens.
        """

    @abstractmethod
    def is_out_of_bounds(self, log_weights_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """bool, [B, T] or [B, 1]: the weights that a bound has changed; for the log."""


@dataclass(frozen=True, kw_only=True)
class TruncatedWeights(WeightedCorrection):
    """min(w, upper): truncated importance sampling (TIS, https://fengyao.notion.site/off-policy-rl).

    With an infinite bound it is decoupled PPO (https://arxiv.org/abs/2110.00641), whose proximal policy is pi_old.

    Args:
        weight: Of what w is the ratio: TokenRatio, GeometricRatio or ProductRatio.
        upper: The largest weight, > 0.
    """

    weight: Ratio
    upper: float

    def __post_init__(self) -> None:
        _check_level("weight", self.weight)
        require(self.upper > 0, "correction.upper", "> 0", self.upper)

    def __call__(self, log_weights_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """See `truncated_weights`."""
        return truncated_weights(self.weight(log_weights_BT, mask_BT), upper=self.upper)

    def is_out_of_bounds(self, log_weights_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Where w is above the bound."""
        return finite_exp(self.weight(log_weights_BT, mask_BT)) > self.upper


@dataclass(frozen=True, kw_only=True)
class MaskedWeights(WeightedCorrection):
    """w where lower <= g <= upper, 0 elsewhere.

    =================  =================  ==============================================================
    weight             gate               name
    =================  =================  ==============================================================
    TokenRatio         TokenRatio         MIS by token; IcePop (https://arxiv.org/abs/2510.18855), [0.5, 5]
    ProductRatio       ProductRatio       MIS by completion
    TokenRatio         GeometricRatio     rejection of completions that drifted, about [0.999, 1.002]
    =================  =================  ==============================================================

    Args:
        weight: Of what w is the ratio: TokenRatio, GeometricRatio or ProductRatio.
        gate: Of what g is the ratio: the same three.
        lower: The smallest g that is kept, >= 0.
        upper: The largest g that is kept, > lower.
    """

    weight: Ratio
    gate: Ratio
    lower: float
    upper: float

    def __post_init__(self) -> None:
        _check_level("weight", self.weight)
        _check_level("gate", self.gate)
        require(self.lower >= 0, "correction.lower", ">= 0", self.lower)
        require(self.upper > self.lower, "correction.upper", "> correction.lower", self.upper)

    def __call__(self, log_weights_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """See `masked_weights`."""
        return masked_weights(
            self.weight(log_weights_BT, mask_BT),
            self.gate(log_weights_BT, mask_BT),
            lower=self.lower,
            upper=self.upper,
        )

    def is_out_of_bounds(self, log_weights_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Where g is outside of the bounds."""
        gates = finite_exp(self.gate(log_weights_BT, mask_BT))
        return (gates < self.lower) | (gates > self.upper)


@dataclass(frozen=True, kw_only=True)
class Bypass(Correction):
    """pi_old := mu. The ratio pi_theta / mu has the correction in it, and no old log-probabilities are computed."""


def _check_level(key: str, level: Ratio) -> None:
    allowed = ", ".join(kind.__name__ for kind in LEVELS)
    require(isinstance(level, LEVELS), f"correction.{key}", f"one of {allowed}", name(level))

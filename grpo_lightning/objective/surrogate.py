"""Surrogates: how probability ratio and advantage make a token's objective."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from grpo_lightning.functional.ratios import finite_exp
from grpo_lightning.functional.surrogates import (
    capped_importance_sampling,
    clipped,
    geometric_mean,
    is_clipped_high,
    is_clipped_low,
    log_likelihood,
    soft_adaptive,
    two_sided_clipped,
    variational_soft,
)
from grpo_lightning.objective.ratio import (
    GeometricRatio,
    GeometricTokenRatio,
    NoRatio,
    ProductRatio,
    Ratio,
    TokenRatio,
)
from grpo_lightning.objective.settings import require

ANY_RATIO: tuple[type[Ratio], ...] = (TokenRatio, GeometricRatio, GeometricTokenRatio, ProductRatio)


class Surrogate(ABC):
    """The objective of each token, to be maximised."""

    ratios: ClassVar[tuple[type[Ratio], ...]] = (*ANY_RATIO, NoRatio)
    """The ratios that it is made for; an objective with another one is refused."""
    takes_token_advantages: ClassVar[bool] = True
    """Whether the tokens of a completion may have different advantages."""

    @abstractmethod
    def __call__(self, log_ratios_BT: Tensor, logprobs_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The objective of each token, of shape [B, T], or [B, 1] where a completion's tokens all have the same.

        Args:
            log_ratios_BT: What the objective's ratio made of log pi_theta - log pi_old.
            logprobs_BT: log pi_theta.
            advantages_BT: Shape [B, 1] where the tokens of a completion have one advantage.
            mask_BT: bool, the loss tokens.
        """

    @abstractmethod
    def statistics(self, log_ratios_BT: Tensor, advantages_BT: Tensor) -> dict[str, Tensor]:
        """Per metric name, what is averaged over the loss tokens; asked for without gradient."""


@dataclass(frozen=True, kw_only=True)
class Clipped(Surrogate):
    """min[rho A, clip(rho, 1 - clip_low, 1 + clip_high) A] (PPO, equation 7; DeepSeekMath, equation 3).

    Args:
        clip_low: How far the ratio may fall below 1, > 0; from 1 on nothing is clipped there.
        clip_high: How far the ratio may rise above 1, > 0.
    """

    clip_low: float
    clip_high: float
    ratios: ClassVar[tuple[type[Ratio], ...]] = ANY_RATIO

    def __post_init__(self) -> None:
        _check_clip(self.clip_low, self.clip_high)

    def __call__(self, log_ratios_BT: Tensor, logprobs_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor) -> Tensor:  # noqa: ARG002 - of the ratio alone
        """See `clipped`."""
        return clipped(log_ratios_BT, advantages_BT, clip_low=self.clip_low, clip_high=self.clip_high)

    def statistics(self, log_ratios_BT: Tensor, advantages_BT: Tensor) -> dict[str, Tensor]:
        """The shares of tokens that the clip took the gradient of."""
        return _clip_statistics(log_ratios_BT, advantages_BT, clip_low=self.clip_low, clip_high=self.clip_high)


@dataclass(frozen=True, kw_only=True)
class TwoSidedClipped(Surrogate):
    """`Clipped` with a bound for negative advantages too (INTELLECT-2, https://arxiv.org/abs/2505.07291).

    Args:
        clip_low: How far the ratio may fall below 1, > 0; from 1 on nothing is clipped there.
        clip_high: How far the ratio may rise above 1, > 0.
        delta: The largest ratio at a negative advantage, > 1 + clip_high; the c of the dual clip.
    """

    clip_low: float
    clip_high: float
    delta: float
    ratios: ClassVar[tuple[type[Ratio], ...]] = ANY_RATIO

    def __post_init__(self) -> None:
        _check_clip(self.clip_low, self.clip_high)
        require(self.delta > 1 + self.clip_high, "surrogate.delta", "> 1 + surrogate.clip_high", self.delta)

    def __call__(self, log_ratios_BT: Tensor, logprobs_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor) -> Tensor:  # noqa: ARG002 - of the ratio alone
        """See `two_sided_clipped`."""
        return two_sided_clipped(
            log_ratios_BT, advantages_BT, clip_low=self.clip_low, clip_high=self.clip_high, delta=self.delta
        )

    def statistics(self, log_ratios_BT: Tensor, advantages_BT: Tensor) -> dict[str, Tensor]:
        """The shares of tokens that each bound took the gradient of."""
        is_beyond_BT = (finite_exp(log_ratios_BT) > self.delta) & (advantages_BT < 0)
        shares = _clip_statistics(log_ratios_BT, advantages_BT, clip_low=self.clip_low, clip_high=self.clip_high)
        return {**shares, "policy/clip_delta": is_beyond_BT}


@dataclass(frozen=True, kw_only=True)
class Cispo(Surrogate):
    """sg[min(rho, ratio_cap)] A log pi: no token loses its gradient (MiniMax-M1, equations 4 and 5).

    https://arxiv.org/abs/2506.13585

    Args:
        ratio_cap: The largest ratio, > 0: an absolute bound, not how far it may rise above 1.
    """

    ratio_cap: float
    ratios: ClassVar[tuple[type[Ratio], ...]] = (TokenRatio, GeometricRatio, ProductRatio)

    def __post_init__(self) -> None:
        require(self.ratio_cap > 0, "surrogate.ratio_cap", "> 0", self.ratio_cap)

    def __call__(self, log_ratios_BT: Tensor, logprobs_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor) -> Tensor:  # noqa: ARG002 - tokens by themselves
        """See `capped_importance_sampling`."""
        return capped_importance_sampling(log_ratios_BT, logprobs_BT, advantages_BT, ratio_cap=self.ratio_cap)

    def statistics(self, log_ratios_BT: Tensor, advantages_BT: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """The share of tokens whose ratio is held at the cap."""
        return {"policy/ratio_capped": finite_exp(log_ratios_BT) > self.ratio_cap}


@dataclass(frozen=True, kw_only=True)
class Sapo(Surrogate):
    """(4 / tau) sigmoid(tau (rho - 1)) A (Soft Adaptive Policy Optimization, https://arxiv.org/abs/2511.20347).

    Args:
        temperature_positive: tau where the advantage is positive, > 0.
        temperature_negative: tau elsewhere, > 0; the larger, the sooner the gate closes.
    """

    temperature_positive: float
    temperature_negative: float
    ratios: ClassVar[tuple[type[Ratio], ...]] = ANY_RATIO

    def __post_init__(self) -> None:
        require(self.temperature_positive > 0, "surrogate.temperature_positive", "> 0", self.temperature_positive)
        require(self.temperature_negative > 0, "surrogate.temperature_negative", "> 0", self.temperature_negative)

    def __call__(self, log_ratios_BT: Tensor, logprobs_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor) -> Tensor:  # noqa: ARG002 - of the ratio alone
        """See `soft_adaptive`."""
        return soft_adaptive(
            log_ratios_BT,
            advantages_BT,
            temperature_positive=self.temperature_positive,
            temperature_negative=self.temperature_negative,
        )

    def statistics(self, log_ratios_BT: Tensor, advantages_BT: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """None: the gate takes no gradient away altogether."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Gmpo(Surrogate):
    """The geometric mean of clipped token ratios, times A (Geometric-Mean Policy Optimization).

    https://arxiv.org/abs/2507.20673. It takes the tokens' ratios and makes the completion's itself.

    Args:
        log_clip: How far the logarithm of a token's ratio may move in the direction of its advantage, > 0.
    """

    log_clip: float
    ratios: ClassVar[tuple[type[Ratio], ...]] = (TokenRatio,)
    takes_token_advantages: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.log_clip > 0, "surrogate.log_clip", "> 0", self.log_clip)

    def __call__(self, log_ratios_BT: Tensor, logprobs_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor) -> Tensor:  # noqa: ARG002 - of the ratio alone
        """See `geometric_mean`."""
        return geometric_mean(log_ratios_BT, advantages_BT, mask_BT, log_clip=self.log_clip)

    def statistics(self, log_ratios_BT: Tensor, advantages_BT: Tensor) -> dict[str, Tensor]:
        """The shares of tokens that the clip took the gradient of."""
        return _clip_statistics(
            log_ratios_BT,
            advantages_BT,
            clip_low=1 - math.exp(-self.log_clip),
            clip_high=math.exp(self.log_clip) - 1,
        )


@dataclass(frozen=True, kw_only=True)
class Vespo(Surrogate):
    """sg[W^k exp(lambda (1 - W))] A log pi, W the ratio of the whole completion (VESPO).

    https://arxiv.org/abs/2602.10693

    Args:
        power_positive: k where the advantage is not negative, >= 0.
        rate_positive: lambda there, >= 0.
        power_negative: k where the advantage is negative, >= 0.
        rate_negative: lambda there, >= 0.
    """

    power_positive: float
    rate_positive: float
    power_negative: float
    rate_negative: float
    ratios: ClassVar[tuple[type[Ratio], ...]] = (ProductRatio,)

    def __post_init__(self) -> None:
        for name in ("power_positive", "rate_positive", "power_negative", "rate_negative"):
            require(getattr(self, name) >= 0, f"surrogate.{name}", ">= 0", getattr(self, name))

    def __call__(self, log_ratios_BT: Tensor, logprobs_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor) -> Tensor:  # noqa: ARG002 - the ratio is of the loss tokens
        """See `variational_soft`."""
        return variational_soft(
            log_ratios_BT,
            logprobs_BT,
            advantages_BT,
            powers=(self.power_positive, self.power_negative),
            rates=(self.rate_positive, self.rate_negative),
        )

    def statistics(self, log_ratios_BT: Tensor, advantages_BT: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """None: the kernel takes no gradient away altogether."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Reinforce(Surrogate):
    """A log pi (Williams 1992): the policy gradient itself, right for completions that the policy has just drawn."""

    ratios: ClassVar[tuple[type[Ratio], ...]] = (NoRatio,)

    def __call__(self, log_ratios_BT: Tensor, logprobs_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor) -> Tensor:  # noqa: ARG002 - of the log-probability alone
        """See `log_likelihood`."""
        return log_likelihood(logprobs_BT, advantages_BT)

    def statistics(self, log_ratios_BT: Tensor, advantages_BT: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """None."""
        return {}


def _check_clip(clip_low: float, clip_high: float) -> None:
    require(clip_low > 0, "surrogate.clip_low", "> 0", clip_low)
    require(clip_high > 0, "surrogate.clip_high", "> 0", clip_high)


def _clip_statistics(
    log_ratios_BT: Tensor, advantages_BT: Tensor, *, clip_low: float, clip_high: float
) -> dict[str, Tensor]:
    low_BT = is_clipped_low(log_ratios_BT, advantages_BT, clip_low=clip_low)
    high_BT = is_clipped_high(log_ratios_BT, advantages_BT, clip_high=clip_high)
    return {"policy/clip_low": low_BT, "policy/clip_high": high_BT, "policy/clip_fraction": low_BT | high_BT}

"""Surrogate objectives: what a token contributes, given its probability ratio and advantage."""

from typing import NamedTuple

import torch
from torch import Tensor


class ClippedSurrogate(NamedTuple):
    """The surrogate of each token, and where the clip took its gradient away."""

    values_BT: Tensor
    is_clipped_low_BT: Tensor
    is_clipped_high_BT: Tensor


def clipped_surrogate(
    log_ratios_BT: Tensor, advantages_BT: Tensor, *, clip_low: float, clip_high: float
) -> ClippedSurrogate:
    r"""PPO's pessimistic, clipped surrogate.

    .. math::
        \min\left[\rho A,\ \operatorname{clip}(\rho, 1-\epsilon_{low}, 1+\epsilon_{high})\, A\right],
        \qquad \rho = \pi_\theta / \pi_{old}

    The gradient vanishes where :math:`A > 0, \rho > 1 + \epsilon_{high}` and where
    :math:`A < 0, \rho < 1 - \epsilon_{low}`.

    Args:
        log_ratios_BT: log of rho.
        advantages_BT: A, broadcastable to the log ratios.
        clip_low: epsilon_low, in (0, 1].
        clip_high: epsilon_high, > 0.

    Source: Schulman et al. 2017, equation 7 (https://arxiv.org/abs/1707.06347); DeepSeekMath, equation 3.

    Example:
        >>> log_ratios, advantages = torch.tensor([[2.0, 0.5, 2.0]]).log(), torch.tensor([[1.0, -1.0, -1.0]])
        >>> [round(v, 4) for v in clipped_surrogate(log_ratios, advantages, clip_low=0.2, clip_high=0.2)[0][0].tolist()]
        [1.2, -0.8, -2.0]
    """
    ratios_BT = finite_exp(log_ratios_BT)
    clipped_BT = ratios_BT.clamp(1 - clip_low, 1 + clip_high)
    return ClippedSurrogate(
        torch.minimum(ratios_BT * advantages_BT, clipped_BT * advantages_BT),
        (ratios_BT < 1 - clip_low) & (advantages_BT < 0),
        (ratios_BT > 1 + clip_high) & (advantages_BT > 0),
    )


def finite_exp(log_ratios: Tensor) -> Tensor:
    """Exp that stays finite, with a finite gradient, at any log-ratio: beyond +-60 it goes on as a constant."""
    return log_ratios.clamp(-60.0, 60.0).exp()

r"""Surrogates: what a token adds to the objective, given its probability ratio and advantage; to be maximised.

On-policy (:math:`\rho = 1`) every one of them has the gradient :math:`A \nabla \log \pi`; they differ in how the
gradient ends when the policy moves away. Ratios come as logarithms. Where the gradient must not flow through a ratio it
is detached here, and nowhere else.
"""

import torch
from torch import Tensor

from grpo_lightning.functional.ratios import finite_exp, sequence_mean


def clipped(log_ratios_BT: Tensor, advantages_BT: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    r"""PPO's pessimistic, clipped surrogate.

    .. math::
        \min\left[\rho A,\ \operatorname{clip}(\rho, 1-\epsilon_{low}, 1+\epsilon_{high})\, A\right],
        \qquad \rho = \pi_\theta / \pi_{old}

    The gradient vanishes where :math:`A > 0, \rho > 1 + \epsilon_{high}` and where
    :math:`A < 0, \rho < 1 - \epsilon_{low}`. At :math:`A < 0` it grows with :math:`\rho` without bound: see
    `two_sided_clipped`.

    Args:
        log_ratios_BT: log of rho.
        advantages_BT: A, broadcastable to the log ratios.
        clip_low: epsilon_low, > 0.
        clip_high: epsilon_high, > 0.

    Source: Schulman et al. 2017, equation 7 (https://arxiv.org/abs/1707.06347); DeepSeekMath, equation 3; two bounds:
    DAPO, equation 10 (https://arxiv.org/abs/2503.14476).

    Example:
        >>> log_ratios, advantages = torch.tensor([[2.0, 0.5, 2.0]]).log(), torch.tensor([[1.0, -1.0, -1.0]])
        >>> [round(v, 4) for v in clipped(log_ratios, advantages, clip_low=0.2, clip_high=0.2)[0].tolist()]
        [1.2, -0.8, -2.0]
    """
    ratios_BT = finite_exp(log_ratios_BT)
    clipped_BT = ratios_BT.clamp(1 - clip_low, 1 + clip_high)
    return torch.minimum(ratios_BT * advantages_BT, clipped_BT * advantages_BT)


def two_sided_clipped(
    log_ratios_BT: Tensor, advantages_BT: Tensor, *, clip_low: float, clip_high: float, delta: float
) -> Tensor:
    r"""`clipped` with a bound for negative advantages as well.

    .. math::
        \min\left[\min(\rho, \delta)\, A,\ \operatorname{clip}(\rho, 1-\epsilon_{low}, 1+\epsilon_{high})\, A\right]

    The gradient also vanishes where :math:`A < 0, \rho > \delta`, which is the dual clip with c = delta.

    Args:
        log_ratios_BT: log of rho.
        advantages_BT: A, broadcastable to the log ratios.
        clip_low: epsilon_low, > 0.
        clip_high: epsilon_high, > 0.
        delta: > 1 + clip_high.

    Source: INTELLECT-2, two-sided clipping (https://arxiv.org/abs/2505.07291); Ye et al. 2020
    (https://arxiv.org/abs/1912.09729).
    """
    ratios_BT = finite_exp(log_ratios_BT)
    clipped_BT = ratios_BT.clamp(1 - clip_low, 1 + clip_high)
    return torch.minimum(ratios_BT.clamp(max=delta) * advantages_BT, clipped_BT * advantages_BT)


def capped_importance_sampling(
    log_ratios_BT: Tensor, logprobs_BT: Tensor, advantages_BT: Tensor, *, ratio_cap: float
) -> Tensor:
    r"""CISPO: :math:`\operatorname{sg}[\min(\rho, c)]\, A \log \pi_\theta`.

    No token loses its gradient, which is :math:`\min(\rho, c)\, A` times that of its log-probability.

    Args:
        log_ratios_BT: log of rho.
        logprobs_BT: log pi_theta.
        advantages_BT: A.
        ratio_cap: c, > 0: the largest ratio itself, not how far it may rise above 1.

    Source: MiniMax-M1, equations 4 and 5 (https://arxiv.org/abs/2506.13585), without the lower bound, which the paper
    leaves off too.
    """
    return finite_exp(log_ratios_BT.detach()).clamp(max=ratio_cap) * advantages_BT * logprobs_BT


def soft_adaptive(
    log_ratios_BT: Tensor, advantages_BT: Tensor, *, temperature_positive: float, temperature_negative: float
) -> Tensor:
    r"""SAPO: :math:`\frac{4}{\tau}\, \sigma(\tau (\rho - 1))\, A`, a gate that closes smoothly on both sides.

    With :math:`p = \sigma(\tau(\rho - 1))` the gradient is :math:`4 p (1 - p)\, \rho A` times that of the
    log-probability.

    Args:
        log_ratios_BT: log of rho.
        advantages_BT: A.
        temperature_positive: tau where A > 0.
        temperature_negative: tau elsewhere; the larger, the sooner the gate closes.

    Source: Soft Adaptive Policy Optimization (https://arxiv.org/abs/2511.20347).
    """
    temperature_BT = _chosen(advantages_BT > 0, temperature_positive, temperature_negative, like=advantages_BT)
    gate_BT = (temperature_BT * (finite_exp(log_ratios_BT) - 1)).sigmoid()
    return 4 / temperature_BT * gate_BT * advantages_BT


def geometric_mean(log_ratios_BT: Tensor, advantages_B1: Tensor, mask_BT: Tensor, *, log_clip: float) -> Tensor:
    r"""GMPO: the geometric mean of the ratios, each of which is clipped by itself, pessimistically.

    .. math::
        \Big\{\prod_t \big[\min(\rho_t^{s},\ \operatorname{clip}(\rho_t^{s}, e^{-c}, e^{c}))\big]^{s}\Big\}^{1/|o|} A,
        \qquad s = \operatorname{sgn} A

    that is, of log-ratios held below c where A > 0, and above -c where A < 0. Unclipped it is that of GSPO.

    Args:
        log_ratios_BT: log of rho.
        advantages_B1: A, one per completion.
        mask_BT: bool, the loss tokens.
        log_clip: c, > 0.

    Returns:
        Shape [B, 1].

    Source: Geometric-Mean Policy Optimization (https://arxiv.org/abs/2507.20673).
    """
    signs_B1 = advantages_B1.sign()
    held_BT = (signs_B1 * log_ratios_BT).clamp(max=log_clip) * signs_B1
    return finite_exp(sequence_mean(held_BT, mask_BT)) * advantages_B1


def variational_soft(
    log_weights_B1: Tensor,
    logprobs_BT: Tensor,
    advantages_BT: Tensor,
    *,
    powers: tuple[float, float],
    rates: tuple[float, float],
) -> Tensor:
    r"""VESPO: :math:`\operatorname{sg}[\phi(W)]\, A \log \pi_\theta` with :math:`\phi(W) = W^k e^{\lambda (1 - W)}`.

    phi is 1 at W = 1, largest at :math:`W = k/\lambda`, and ends at 0 on both sides.

    Args:
        log_weights_B1: log of W, the ratio of the whole completion.
        logprobs_BT: log pi_theta.
        advantages_BT: A.
        powers: k where A >= 0, and elsewhere.
        rates: lambda where A >= 0, and elsewhere.

    Source: VESPO (https://arxiv.org/abs/2602.10693).
    """
    log_weights_B1 = log_weights_B1.detach()
    power_BT = _chosen(advantages_BT >= 0, *powers, like=advantages_BT)
    rate_BT = _chosen(advantages_BT >= 0, *rates, like=advantages_BT)
    log_phi_BT = power_BT * log_weights_B1 + rate_BT * (1 - finite_exp(log_weights_B1))
    return finite_exp(log_phi_BT) * advantages_BT * logprobs_BT


def log_likelihood(logprobs_BT: Tensor, advantages_BT: Tensor) -> Tensor:
    r"""REINFORCE: :math:`A \log \pi_\theta`.

    Source: Williams 1992 (https://doi.org/10.1007/BF00992696).
    """
    return advantages_BT * logprobs_BT


def is_clipped_low(log_ratios_BT: Tensor, advantages_BT: Tensor, *, clip_low: float) -> Tensor:
    """bool: a negative advantage whose ratio fell below 1 - clip_low, so that its gradient ended."""
    return (finite_exp(log_ratios_BT) < 1 - clip_low) & (advantages_BT < 0)


def is_clipped_high(log_ratios_BT: Tensor, advantages_BT: Tensor, *, clip_high: float) -> Tensor:
    """bool: a positive advantage whose ratio rose above 1 + clip_high, so that its gradient ended."""
    return (finite_exp(log_ratios_BT) > 1 + clip_high) & (advantages_BT > 0)


def _chosen(condition: Tensor, one: float, other: float, *, like: Tensor) -> Tensor:
    """`torch.where` of two numbers, in the precision of `like` (it would take fp32)."""
    return torch.full_like(like, other).masked_fill(condition, one)

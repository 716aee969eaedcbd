r"""Estimators of the Kullback-Leibler divergence from sampled tokens, and what their gradients really are.

With samples of the policy, per bandit or whole completion, and :math:`x = \pi_{ref}/\pi_\theta`:

=========  ==========================  ====================================  =======================================
estimator  formula                     expected value                        expected gradient as a loss
=========  ==========================  ====================================  =======================================
k1         :math:`-\log x`             KL(pi_theta || pi_ref)                0: it penalises nothing
k2         :math:`\tfrac12 \log^2 x`   not the divergence                    that of KL(pi_theta || pi_ref)
k3         :math:`x - \log x - 1`      KL(pi_theta || pi_ref)                that of KL(pi_ref || pi_theta), the other
=========  ==========================  ====================================  =======================================

k1 taken off the reward, detached, has the gradient of KL(pi_theta || pi_ref). Off-policy, :math:`\rho\, k` with the
gradient flowing through rho as well has it too, for k1 and k3; without rho k2 and k3 are biased. Summed over tokens,
the penalties in the loss leave out how the policy changes which states are visited; k1 as reward to go does not.

Source: Schulman 2020 (http://joschu.net/blog/kl-approx.html); Liu et al. 2025 (https://arxiv.org/abs/2510.01555).
"""

from torch import Tensor

from grpo_lightning.functional.ratios import finite_exp


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    r""":math:`\log \pi_\theta - \log \pi_{ref}`: unbiased for KL(pi_theta || pi_ref) on-policy, of high variance.

    Source: Schulman 2020 (http://joschu.net/blog/kl-approx.html).
    """
    return logprobs - reference_logprobs


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    r""":math:`\tfrac{1}{2} (\log \pi_\theta - \log \pi_{ref})^2`: biased, but of the right gradient on-policy.

    Source: Schulman 2020 (http://joschu.net/blog/kl-approx.html).
    """
    return (logprobs - reference_logprobs).square() / 2


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    r""":math:`x - \log x - 1` with :math:`x = \pi_{ref} / \pi_\theta`: unbiased on-policy, and never negative.

    Its gradient, taken as a loss on samples of pi_theta, is that of KL(pi_ref || pi_theta).

    Source: DeepSeekMath, equation 4 (https://arxiv.org/abs/2402.03300); Schulman 2020.

    Example:
        >>> import torch
        >>> round(k3(torch.tensor(0.5).log(), torch.tensor(0.25).log()).item(), 6)  # x = 1/2: 0.5 + log 2 - 1
        0.193147
    """
    log_x = reference_logprobs - logprobs
    return finite_exp(log_x) - log_x - 1


def importance_weighted(estimates: Tensor, log_ratios: Tensor) -> Tensor:
    r""":math:`\rho\, k` with :math:`\rho = \pi_\theta / \pi_{old}` and the gradient flowing through both.

    On samples of pi_old it has, for k1 and k3, the value and the gradient of KL(pi_theta || pi_ref).

    Args:
        estimates: k of each token.
        log_ratios: log of rho of each token, not detached.

    Source: DeepSeek-V3.2, unbiased KL estimate (https://arxiv.org/abs/2512.02556).
    """
    return finite_exp(log_ratios) * estimates

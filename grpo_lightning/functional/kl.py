"""Estimators of the Kullback-Leibler divergence from sampled tokens."""

from torch import Tensor

from grpo_lightning.functional.surrogates import finite_exp


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    r""":math:`\log \pi_\theta - \log \pi_{ref}`: unbiased for KL(pi_theta || pi_ref) on-policy, of high variance.

    Source: Schulman 2020 (http://joschu.net/blog/kl-approx.html).
    """
    return logprobs - reference_logprobs


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

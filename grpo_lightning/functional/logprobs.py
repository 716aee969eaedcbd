"""Log-probabilities and entropies of given tokens, from logits."""

import torch
from torch import Tensor


def logprobs_and_entropy(
    logits_NV: Tensor, targets_N: Tensor, *, temperature: float, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Log-probability of each target and entropy of its distribution.

    .. math::
        \log\pi(y_n) = z_{n,y_n} - \log\sum_v e^{z_{n,v}}, \qquad H_n = -\sum_v \pi_v \log\pi_v,
        \qquad z = \text{logits} / T

    Computed in at least fp32.

    Args:
        logits_NV: Unscaled logits.
        targets_N: int64, the tokens to score.
        temperature: T, > 0, the temperature that the tokens were drawn at.
        entropy_gradient: Whether gradient flows through the entropy. Where it is a statistic alone, it costs no memory.

    Returns:
        The log-probabilities and the entropies in nats, each of shape N.
    """
    precision = torch.promote_types(logits_NV.dtype, torch.float32)
    log_probabilities_NV = torch.log_softmax(logits_NV.to(precision) / temperature, dim=-1)
    logprobs_N = log_probabilities_NV.gather(-1, targets_N[:, None]).squeeze(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy_N = -(log_probabilities_NV.exp() * log_probabilities_NV).sum(dim=-1)
    return logprobs_N, entropy_N

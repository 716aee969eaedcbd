"""Which tokens and completions keep their policy gradient."""

import math

import torch
from torch import Tensor

from grpo_lightning.functional.ratios import sequence_mean


def near_policy_sequences(
    logprobs_BT: Tensor, sampler_logprobs_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, *, max_drift: float
) -> Tensor:
    r"""bool: False where the advantage is negative and the policy has moved away from who drew the completion.

    .. math::
        M_{i,t} = 0 \iff \hat A_{i,t} < 0 \ \wedge\ \frac{1}{|o_i|} \sum_s \log\frac{\mu(o_s)}{\pi_\theta(o_s)} > \delta

    A bad completion that the policy would hardly draw any more teaches nothing about the policy.

    Args:
        logprobs_BT: log pi_theta.
        sampler_logprobs_BT: log mu.
        advantages_BT: A.
        mask_BT: bool, the loss tokens.
        max_drift: delta, > 0; infinity masks nothing.

    Source: DeepSeek-V3.2, off-policy sequence masking (https://arxiv.org/abs/2512.02556).
    """
    drift_B1 = sequence_mean(sampler_logprobs_BT - logprobs_BT.detach(), mask_BT)
    return ~((advantages_BT < 0) & (drift_B1 > max_drift))


def top_entropy_threshold(entropies_N: Tensor, *, share: float) -> Tensor:
    r"""The entropy that the :math:`\lceil \rho N \rceil` most uncertain tokens reach, a scalar.

    Args:
        entropies_N: Of all loss tokens that are ranked together: those of the whole global minibatch.
        share: rho, in (0, 1].

    Returns:
        Infinity where there are no tokens. Tokens that tie with the last are all kept.

    Source: Beyond the 80/20 Rule (https://arxiv.org/abs/2506.01939).
    """
    count = len(entropies_N)
    if not count:
        return entropies_N.new_tensor(float("inf"))
    num_kept = math.ceil(share * count - 1e-9)  # 0.2 of 5 tokens is one token, whatever 0.2 is in binary
    return torch.kthvalue(entropies_N, count - num_kept + 1).values

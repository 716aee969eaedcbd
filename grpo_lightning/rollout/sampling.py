"""Drawing tokens: the distribution really drawn from, and one uniform number per draw."""

import math

import torch
from torch import Tensor

from grpo_lightning.types import SamplingParams


def sampling_logprobs(logits_RV: Tensor, sampling: SamplingParams) -> Tensor:
    """Log-probabilities of the distribution that tokens are drawn from, in at least fp32.

    Temperature first, then top-k, then top-p on what is left; a greedy choice (temperature 0) is told at temperature 1.

    Args:
        logits_RV: Unscaled logits; -inf for tokens that must not be drawn.
        sampling: Temperature, top-k and top-p.
    """
    logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    logits_RV = logits_RV / (sampling.temperature or 1.0)
    if sampling.top_k is not None and sampling.top_k < logits_RV.shape[1]:
        smallest_R1 = logits_RV.topk(sampling.top_k, dim=1).values[:, -1:]
        logits_RV = logits_RV.masked_fill(logits_RV < smallest_R1, -math.inf)
    if sampling.top_p < 1:
        sorted_RV, order_RV = logits_RV.sort(dim=1, descending=True, stable=True)
        before_RV = sorted_RV.softmax(dim=1).cumsum(dim=1) - sorted_RV.softmax(dim=1)
        is_out_RV = torch.zeros_like(before_RV, dtype=torch.bool).scatter(1, order_RV, before_RV >= sampling.top_p)
        logits_RV = logits_RV.masked_fill(is_out_RV, -math.inf)
    return logits_RV.log_softmax(dim=1)


def draw(logprobs_RV: Tensor, uniforms_R: Tensor) -> Tensor:
    """Draw one token per row by inverting its cumulative distribution: the first whose cumulative exceeds the number.

    The cumulative sum goes over blocks and then within one block, as small products with a triangle of ones, which is
    deterministic on every device and never sorts or scans the vocabulary.

    Args:
        logprobs_RV: Of each row's distribution.
        uniforms_R: float64 in [0, 1), one per row.
    """
    num_rows, vocabulary = logprobs_RV.shape
    size = math.isqrt(vocabulary - 1) + 1
    probabilities_RV = torch.nn.functional.pad(logprobs_RV.exp(), (0, size * size - vocabulary))
    blocks_RKS = probabilities_RV.view(num_rows, size, size)
    triangle_SS = torch.ones(size, size, dtype=probabilities_RV.dtype, device=probabilities_RV.device).triu()
    ends_RK = blocks_RKS.sum(dim=2) @ triangle_SS
    thresholds_R1 = (uniforms_R[:, None] * ends_RK[:, -1:]).to(ends_RK.dtype)
    block_R1 = (ends_RK <= thresholds_R1).sum(dim=1, keepdim=True).clamp(max=size - 1)
    block_RS = blocks_RKS.gather(1, block_R1[..., None].expand(-1, -1, size)).squeeze(1)
    before_R1 = ends_RK.gather(1, block_R1) - block_RS.sum(dim=1, keepdim=True)
    within_R1 = (before_R1 + block_RS @ triangle_SS <= thresholds_R1).sum(dim=1, keepdim=True).clamp(max=size - 1)
    tokens_R = (block_R1 * size + within_R1).squeeze(1)
    # Rounding at the very end of the distribution must not draw what has no probability.
    is_possible_R = probabilities_RV.gather(1, tokens_R[:, None]).squeeze(1) > 0
    return torch.where(is_possible_R, tokens_R, probabilities_RV.argmax(dim=1))

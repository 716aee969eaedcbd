"""Drawing tokens: the distribution really drawn from, and one uniform number per draw."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_lightning.types import SamplingParams

_LARGEST_SINGLE_LEVEL = 256


class Draw(NamedTuple):
    """A token per row, and what the distribution that it was drawn from says of it."""

    tokens_R: Tensor
    """int64."""
    logprobs_R: Tensor
    """Natural logarithm, in at least fp32."""


def sample(logits_RV: Tensor, uniforms_R: Tensor, sampling: SamplingParams) -> Draw:
    """Draw one token per row.

    At temperature 0 the token is the likeliest, the first of equals. Its distribution is a point mass, whose log-prob
    of 0 would tell nothing: what is reported is the log-prob at temperature 1.

    Args:
        logits_RV: Unscaled logits; -inf for tokens that must not be drawn.
        uniforms_R: float64 in [0, 1), one per row.
        sampling: Temperature, top-k and top-p.
    """
    logprobs_RV = sampling_logprobs(logits_RV, sampling)
    tokens_R = logprobs_RV.argmax(dim=1) if sampling.temperature == 0 else draw(logprobs_RV.exp(), uniforms_R)
    return Draw(tokens_R, logprobs_RV.gather(1, tokens_R[:, None]).squeeze(1))


def sampling_logprobs(logits_RV: Tensor, sampling: SamplingParams) -> Tensor:
    """Log-probabilities of the distribution that tokens are drawn from, in at least fp32.

    Temperature first, then top-k, then top-p on what is left. Tokens that tie with the k-th likeliest are all kept,
    since any choice between them would hang on the order of a sort.

    Args:
        logits_RV: Unscaled logits; -inf for tokens that must not be drawn.
        sampling: Temperature (0 is read as 1), top-k and top-p.
    """
    logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    if sampling.temperature not in (0.0, 1.0):
        logits_RV = logits_RV / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_RV.shape[1]:
        smallest_R1 = logits_RV.topk(sampling.top_k, dim=1).values[:, -1:]
        logits_RV = logits_RV.masked_fill(logits_RV < smallest_R1, -math.inf)
    if sampling.top_p < 1:
        logits_RV = logits_RV.masked_fill(_is_beyond_top_p(logits_RV, sampling.top_p), -math.inf)
    return logits_RV.log_softmax(dim=1)


def _is_beyond_top_p(logits_RV: Tensor, top_p: float) -> Tensor:
    """The tokens that the likelier ones alone already make superfluous; the likeliest is always kept."""
    sorted_RV, order_RV = logits_RV.double().softmax(dim=1).sort(dim=1, descending=True, stable=True)
    blocks_RKS = _blocks(sorted_RV)
    within_RKS = _prefix_sums(blocks_RKS)
    ends_RK = _prefix_sums(within_RKS[..., -1])
    before_RKS = within_RKS - blocks_RKS + torch.nn.functional.pad(ends_RK, (1, -1))[..., None]
    is_beyond_RV = before_RKS.flatten(1)[:, : sorted_RV.shape[1]] >= top_p
    is_beyond_RV[:, 0] = False
    return torch.zeros_like(is_beyond_RV).scatter(1, order_RV, is_beyond_RV)


def suppress(logits_RV: Tensor, tokens_V: Tensor, rows_R: Tensor) -> Tensor:
    """The logits with some tokens made impossible in some rows.

    Args:
        logits_RV: Logits.
        tokens_V: bool, the tokens.
        rows_R: bool, the rows.
    """
    return logits_RV.masked_fill(rows_R[:, None] & tokens_V[None], -math.inf)


def draw(weights_RV: Tensor, uniforms_R: Tensor) -> Tensor:
    """Draw one token per row by inverting its cumulative distribution.

    The token is the first whose cumulative weight exceeds the uniform number times the total. A large vocabulary is
    searched in two levels, first over the sums of blocks, then within one block, so that nothing of the vocabulary's
    length is scanned. Sums are in float64, but for those of a block, which are in the precision of its weights: their
    rounding is that of the weights themselves. A token of weight 0 is never drawn.

    Args:
        weights_RV: Probabilities up to a factor per row, >= 0.
        uniforms_R: float64 in [0, 1).
    """
    fractions_R1 = uniforms_R[:, None]
    if weights_RV.shape[1] <= _LARGEST_SINGLE_LEVEL:
        return _invert(weights_RV.double(), fractions_R1)[0].squeeze(1)
    size = _block_size(weights_RV.shape[1])
    block_R1, fractions_R1 = _invert(_block_sums(weights_RV, size).double(), fractions_R1)
    columns_RS = block_R1 * size + torch.arange(size, device=weights_RV.device)
    is_outside_RS = columns_RS >= weights_RV.shape[1]
    chosen_RS = weights_RV.gather(1, columns_RS.masked_fill(is_outside_RS, 0)).masked_fill(is_outside_RS, 0.0)
    return (block_R1 * size + _invert(chosen_RS.double(), fractions_R1)[0]).squeeze(1)


def _block_sums(values_RV: Tensor, size: int) -> Tensor:
    """The sum of each block of the vocabulary, of which the last may be shorter; no copy of the values is made."""
    num_whole = values_RV.shape[1] // size
    whole_RV, rest_RV = values_RV.tensor_split((num_whole * size,), dim=1)
    sums_RK = whole_RV.unflatten(1, (num_whole, size)).sum(dim=2)
    return torch.cat((sums_RK, rest_RV.sum(dim=1, keepdim=True)), dim=1) if rest_RV.shape[1] else sums_RK


def _invert(weights_RN: Tensor, fractions_R1: Tensor) -> tuple[Tensor, Tensor]:
    """The entry that each fraction of the total weight falls into, and which fraction of that entry it is."""
    # Entries of no weight end nowhere: whatever the rounding of the sums, none of them can be the first to exceed.
    ends_RN = _prefix_sums(weights_RN).masked_fill(weights_RN <= 0, -1.0)
    total_R1 = ends_RN.amax(dim=1, keepdim=True)
    threshold_R1 = torch.minimum(fractions_R1 * total_R1, total_R1.nextafter(torch.zeros_like(total_R1)))
    index_R1 = (ends_RN > threshold_R1).to(torch.uint8).argmax(dim=1, keepdim=True)
    weight_R1 = weights_RN.gather(1, index_R1)
    remainder_R1 = (threshold_R1 - ends_RN.gather(1, index_R1)) / weight_R1 + 1.0
    return index_R1, remainder_R1.clamp(0.0, 1.0)


def _prefix_sums(values: Tensor) -> Tensor:
    """Inclusive sums along the last axis, of modest length."""
    if not values.is_cuda:
        return values.cumsum(dim=-1)
    # torch counts the cumulative sum on CUDA among the operations that are not deterministic; a product is.
    length = values.shape[-1]
    return values @ torch.ones(length, length, dtype=values.dtype, device=values.device).triu()


def _blocks(values_RV: Tensor) -> Tensor:
    """The vocabulary cut in about as many blocks as each has entries, the last one filled up with zeros."""
    num_rows, vocabulary = values_RV.shape
    size = _block_size(vocabulary)
    num_blocks = -(-vocabulary // size)
    padded_RV = torch.nn.functional.pad(values_RV, (0, num_blocks * size - vocabulary))
    return padded_RV.view(num_rows, num_blocks, size)


def _block_size(vocabulary: int) -> int:
    """About as many entries as there are blocks: the square root, rounded up."""
    return math.isqrt(vocabulary - 1) + 1

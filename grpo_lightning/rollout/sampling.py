"""Drawing tokens: the distribution really drawn from, and one uniform number per draw."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_lightning.types import SamplingParams

_LARGEST_SINGLE_LEVEL = 256
_ENTRIES_AT_ONCE = 2**20
"""Logits looked at together on a CPU: their weights are 4 MB."""


class Draw(NamedTuple):
    """A token per row, and what the distribution that it was drawn from says of it."""

    tokens_R: Tensor
    """int64."""
    logprobs_R: Tensor
    """Natural logarithm, in at least fp32."""


def sample(logits_RV: Tensor, uniforms_R: Tensor, sampling: SamplingParams) -> Draw:
    """Draw one token per row.

    At temperature 0 the token is the likeliest, the first of equals. Its distribution is a point mass, whose log-prob
    of 0 would tell nothing: what is reported is the log-prob at temperature 1. A row whose logits are not finite, but
    for -inf, has the log-prob NaN.

    On a CPU rows are taken a few at a time, so that what lies between logits and tokens stays in the cache: for a large
    vocabulary, fresh memory for all rows costs more than the arithmetic. A row's token does not depend on the others.

    Args:
        logits_RV: Unscaled logits; -inf for tokens that must not be drawn.
        uniforms_R: float64 in [0, 1), one per row.
        sampling: Temperature, top-k and top-p.
    """
    num_rows, vocabulary = logits_RV.shape
    if logits_RV.device.type != "cpu" or num_rows * vocabulary <= _ENTRIES_AT_ONCE:
        return _sample(logits_RV, uniforms_R, sampling)
    size = max(1, _ENTRIES_AT_ONCE // vocabulary)
    parts = zip(logits_RV.split(size), uniforms_R.split(size), strict=True)
    tokens, logprobs = zip(*(_sample(logits, uniforms, sampling) for logits, uniforms in parts), strict=True)
    return Draw(torch.cat(tokens), torch.cat(logprobs))


def _sample(logits_RV: Tensor, uniforms_R: Tensor, sampling: SamplingParams) -> Draw:
    """`sample` for rows taken together."""
    logits_RV = sampling_logits(logits_RV, sampling)
    weights_RV = logits_RV.softmax(dim=1)
    if sampling.temperature == 0:
        tokens_R, totals_R = logits_RV.argmax(dim=1), weights_RV.sum(dim=1)
    else:
        tokens_R, totals_R = draw(weights_RV, uniforms_R)
    # By the weights drawn from, whose sum is not quite 1: over a large vocabulary, softmax rounds its own in fp32.
    chosen_R = weights_RV.gather(1, tokens_R[:, None]).squeeze(1)
    return Draw(tokens_R, (chosen_R / totals_R).log().to(logits_RV.dtype))


def sampling_logprobs(logits_RV: Tensor, sampling: SamplingParams) -> Tensor:
    """Log-probabilities of the distribution that tokens are drawn from, in at least fp32; see `sampling_logits`."""
    logits_RV = sampling_logits(logits_RV, sampling)
    # Not log_softmax, whose error on a CPU reaches 3e-5 over 150,000 tokens in fp32.
    return logits_RV - logits_RV.logsumexp(dim=1, keepdim=True)


def sampling_logits(logits_RV: Tensor, sampling: SamplingParams) -> Tensor:
    """Logits of the distribution that tokens are drawn from, in at least fp32: those given where nothing changes them.

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
    return logits_RV


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


def suppress_(logits_RV: Tensor, tokens_E: Tensor, rows_R: Tensor) -> None:
    """Make some tokens impossible in some rows, in place.

    Args:
        logits_RV: Logits, which are written to.
        tokens_E: int64, the tokens, each once.
        rows_R: bool, the rows.
    """
    kept_RE = logits_RV.index_select(1, tokens_E)
    logits_RV.index_copy_(1, tokens_E, kept_RE.masked_fill_(rows_R[:, None], -math.inf))


def draw(weights_RV: Tensor, uniforms_R: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting its cumulative distribution.

    The token is the first whose cumulative weight exceeds the uniform number times the total. A large vocabulary is
    searched in two levels, first over the sums of blocks, then within one block, so that nothing of the vocabulary's
    length is scanned. Sums are in float64, but for those of a block, which are in the precision of its weights: their
    rounding is that of the weights themselves. A token of weight 0 is never drawn.

    Args:
        weights_RV: Probabilities up to a factor per row, >= 0.
        uniforms_R: float64 in [0, 1).

    Returns:
        The tokens, and the total weight of each row in float64.
    """
    fractions_R1 = uniforms_R[:, None]
    if weights_RV.shape[1] <= _LARGEST_SINGLE_LEVEL:
        place = _invert(weights_RV.double(), fractions_R1)
        return place.index_R1.squeeze(1), place.total_R1.squeeze(1)
    size = _block_size(weights_RV.shape[1])
    block = _invert(_block_sums(weights_RV, size).double(), fractions_R1)
    first_R1 = block.index_R1 * size
    columns_RS = first_R1 + torch.arange(size, device=weights_RV.device)
    is_outside_RS = columns_RS >= weights_RV.shape[1]
    chosen_RS = weights_RV.gather(1, columns_RS.masked_fill(is_outside_RS, 0)).masked_fill(is_outside_RS, 0.0)
    within = _invert(chosen_RS.double(), block.fractions_R1())
    return (first_R1 + within.index_R1).squeeze(1), block.total_R1.squeeze(1)


def _block_sums(values_RV: Tensor, size: int) -> Tensor:
    """The sum of each block of the vocabulary, of which the last may be shorter; no copy of the values is made."""
    num_whole = values_RV.shape[1] // size
    whole_RV, rest_RV = values_RV.tensor_split((num_whole * size,), dim=1)
    sums_RK = whole_RV.unflatten(1, (num_whole, size)).sum(dim=2)
    return torch.cat((sums_RK, rest_RV.sum(dim=1, keepdim=True)), dim=1) if rest_RV.shape[1] else sums_RK


class _Place(NamedTuple):
    """The entries that fractions of the total weight fall into."""

    index_R1: Tensor
    total_R1: Tensor
    threshold_R1: Tensor
    ends_RN: Tensor
    weights_RN: Tensor

    def fractions_R1(self) -> Tensor:
        """How far into its entry each falls, as a fraction of the entry."""
        end_R1, weight_R1 = self.ends_RN.gather(1, self.index_R1), self.weights_RN.gather(1, self.index_R1)
        return ((self.threshold_R1 - end_R1) / weight_R1 + 1.0).clamp(0.0, 1.0)


def _invert(weights_RN: Tensor, fractions_R1: Tensor) -> _Place:
    """The entry that each fraction of the total weight falls into."""
    # Entries of no weight end nowhere: whatever the rounding of the sums, none of them can be the first to exceed.
    ends_RN = _prefix_sums(weights_RN).masked_fill(weights_RN <= 0, -1.0)
    total_R1 = ends_RN.amax(dim=1, keepdim=True)
    threshold_R1 = torch.minimum(fractions_R1 * total_R1, total_R1.nextafter(torch.zeros_like(total_R1)))
    index_R1 = (ends_RN > threshold_R1).view(torch.uint8).argmax(dim=1, keepdim=True)
    return _Place(index_R1, total_R1, threshold_R1, ends_RN, weights_RN)


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

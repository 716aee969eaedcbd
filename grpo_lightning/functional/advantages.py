"""Advantages before their scale: how much better a completion is than what it is compared with.

All functions take the rewards of P groups of G completions and which of them exist. A completion that is not valid
takes no part in any statistic and gets 0; so does every completion of what is compared where all rewards are equal,
exactly and whatever the rounding.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_lightning.functional.evaluation import pass_at_k


def uncentred(rewards_PG: Tensor, valid_PG: Tensor) -> Tensor:
    """The rewards themselves, without a baseline."""
    return rewards_PG.masked_fill(~valid_PG, 0.0)


def group_centred(rewards_PG: Tensor, valid_PG: Tensor) -> Tensor:
    r""":math:`A_i = r_i - \bar r`, with the mean of the group.

    Its expected policy gradient is :math:`(1 - 1/G)\,\nabla J`.

    Args:
        rewards_PG: r, one per completion; entries that are not valid may hold anything, NaN included.
        valid_PG: bool, which rewards exist.
    """
    known_PG = rewards_PG.masked_fill(~valid_PG, 0.0)
    mean_P1 = known_PG.sum(dim=1, keepdim=True) / valid_PG.sum(dim=1, keepdim=True).clamp(min=1)
    return _deviations(known_PG, mean_P1, valid_PG, has_zero_variance(rewards_PG, valid_PG)[:, None])


def leave_one_out_centred(rewards_PG: Tensor, valid_PG: Tensor) -> Tensor:
    r""":math:`A_i = r_i - \frac{1}{G-1}\sum_{j \neq i} r_j = \frac{G}{G-1}(r_i - \bar r)`.

    The baseline does not depend on the completion itself, so that the expected policy gradient is exactly
    :math:`\nabla J`. A group of one valid completion has nothing to be compared with, and gets 0.

    Args:
        rewards_PG: r; entries that are not valid may hold anything, NaN included.
        valid_PG: bool, which rewards exist; G is their number in the group.

    Source: Ahmadian et al. 2024, Back to Basics (https://arxiv.org/abs/2402.14740); Kool et al. 2019.

    Example:
        >>> leave_one_out_centred(torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool)).tolist()
        [[1.0, -1.0]]
    """
    num_valid_P1 = valid_PG.sum(dim=1, keepdim=True).to(rewards_PG.dtype)
    return group_centred(rewards_PG, valid_PG) * (num_valid_P1 / (num_valid_P1 - 1).clamp(min=1))


def length_weighted_centred(rewards_PG: Tensor, valid_PG: Tensor, lengths_PG: Tensor) -> Tensor:
    r""":math:`A_i = r_i - \sum_j |o_j| r_j / \sum_j |o_j|`, the baseline of least variance.

    It is optimal where the squared gradient of a completion's log-probability grows like its length.

    Args:
        rewards_PG: r; entries that are not valid may hold anything, NaN included.
        valid_PG: bool, which rewards exist.
        lengths_PG: The loss tokens of each completion.

    Source: On-Policy RL with Optimal Reward Baseline (https://arxiv.org/abs/2505.23585).

    Example:
        >>> rewards, valid = torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool)
        >>> length_weighted_centred(rewards, valid, torch.tensor([[3, 1]])).tolist()
        [[0.25, -0.75]]
    """
    known_PG = rewards_PG.masked_fill(~valid_PG, 0.0)
    weights_PG = (lengths_PG * valid_PG).to(known_PG.dtype)
    baseline_P1 = (weights_PG * known_PG).sum(dim=1, keepdim=True) / weights_PG.sum(dim=1, keepdim=True).clamp(min=1)
    return _deviations(known_PG, baseline_P1, valid_PG, has_zero_variance(rewards_PG, valid_PG)[:, None])


def batch_centred(rewards_PG: Tensor, valid_PG: Tensor) -> Tensor:
    """The rewards less the mean over all valid completions of all groups."""
    known_PG = rewards_PG.masked_fill(~valid_PG, 0.0)
    mean = known_PG.sum() / valid_PG.sum().clamp(min=1)
    all_equal = has_zero_variance(rewards_PG.reshape(1, -1), valid_PG.reshape(1, -1))
    return _deviations(known_PG, mean, valid_PG, all_equal)


def group_normalized_advantages(rewards_PG: Tensor, valid_PG: Tensor, *, ddof: int, epsilon: float) -> Tensor:
    r"""Advantages of outcome supervision, normalised within each group.

    .. math::
        \hat A_i = \frac{r_i - \operatorname{mean}(r)}{\operatorname{std}(r) + \epsilon}

    Args:
        rewards_PG: r; entries that are not valid may hold anything, NaN included.
        valid_PG: bool, which rewards exist.
        ddof: 0 for the population's standard deviation, 1 for the sample's.
        epsilon: Added to the standard deviation, >= 0.

    Source: DeepSeekMath, section 4.1.2 (https://arxiv.org/abs/2402.03300). The paper names neither ddof nor epsilon.

    Example:
        >>> rewards, valid = torch.tensor([[1.0, 0.0, 0.0, 1.0]]), torch.ones(1, 4, dtype=torch.bool)
        >>> group_normalized_advantages(rewards, valid, ddof=0, epsilon=0.0).tolist()
        [[1.0, -1.0, -1.0, 1.0]]
    """
    centred_PG = group_centred(rewards_PG, valid_PG)
    freedom_P1 = (valid_PG.sum(dim=1, keepdim=True) - ddof).clamp(min=1)
    std_P1 = (centred_PG.square().sum(dim=1, keepdim=True) / freedom_P1).sqrt()
    return torch.where(centred_PG == 0, 0.0, centred_PG / (std_P1 + epsilon))


def per_reward_normalized(
    values_PGK: Tensor, valid_PG: Tensor, weights_K: Tensor, *, ddof: int, epsilon: float
) -> Tensor:
    r"""Every reward normalised within the group by itself, then summed.

    .. math::
        A_i = \sum_k w_k\, \frac{r_{i,k} - \operatorname{mean}_k}{\operatorname{std}_k + \epsilon}

    so that two completions that reach one total in different ways stay distinct.

    Args:
        values_PGK: The rewards' columns; NaN where a reward does not apply, which leaves the completion out of that
            reward's statistics alone.
        valid_PG: bool, which completions exist.
        weights_K: w.
        ddof: 0 for the population's standard deviation, 1 for the sample's.
        epsilon: Added to each standard deviation, >= 0.

    Source: GDPO (https://arxiv.org/abs/2601.05242), which then whitens the sum over the batch.
    """
    columns = [
        group_normalized_advantages(values_PG, valid_PG & ~values_PG.isnan(), ddof=ddof, epsilon=epsilon)
        for values_PG in values_PGK.unbind(dim=-1)
    ]
    return torch.stack(columns, dim=-1) @ weights_K.to(values_PGK.dtype)


class PassAtKAdvantages(NamedTuple):
    """The advantages of the completions under pass@k, and the deviation that the paper divides them by."""

    centred_PG: Tensor
    deviation_P1: Tensor


def pass_at_k_advantages(is_correct_PG: Tensor, valid_PG: Tensor, *, k: int) -> PassAtKAdvantages:
    r"""The advantage of a completion, averaged over all groups of k that it can be a member of.

    A group of k has reward 1 where any of its members is correct. Over all :math:`\binom{G}{k}` groups, with
    :math:`N^-` incorrect completions,

    .. math::
        \bar R = 1 - \binom{N^-}{k} \Big/ \binom{G}{k}, \quad
        A^+ = 1 - \bar R, \quad
        A^- = 1 - \bar R - \binom{N^- - 1}{k-1} \Big/ \binom{G-1}{k-1}, \quad
        \sigma = \sqrt{\bar R (1 - \bar R)}

    The advantages of a group sum to 0. Undivided, their expected policy gradient is
    :math:`(1/k - 1/G)\, \nabla\,\text{pass@}k`.

    Args:
        is_correct_PG: bool; entries that are not valid may hold anything.
        valid_PG: bool, which completions exist; G is their number in the group.
        k: >= 1. A group of fewer than k valid completions gets 0.

    Source: Pass@k Training, analytical derivation (https://arxiv.org/abs/2508.10751).

    Example:
        >>> correct = torch.tensor([[True, False, False, False]])
        >>> pass_at_k_advantages(correct, torch.ones_like(correct), k=2).centred_PG.tolist()  # R = 1 - 3/6
        [[0.5, -0.16666666666666663, -0.16666666666666663, -0.16666666666666663]]
    """
    num_valid_P, is_correct_PG = valid_PG.sum(dim=1), is_correct_PG & valid_PG
    num_correct_P = is_correct_PG.sum(dim=1)
    reward_P1 = pass_at_k(num_valid_P, num_correct_P, k=k)[:, None]
    # Of the groups with a given incorrect completion, the share without a correct one: k - 1 of the G - 1 others.
    fails_P1 = 1 - pass_at_k((num_valid_P - 1).clamp(min=0), num_correct_P, k=k - 1)[:, None]
    centred_PG = torch.where(is_correct_PG, 1 - reward_P1, 1 - reward_P1 - fails_P1)
    is_void_P1 = (num_valid_P < k)[:, None] | (num_correct_P == 0)[:, None] | (num_correct_P == num_valid_P)[:, None]
    deviation_P1 = (reward_P1 * (1 - reward_P1)).clamp(min=0).sqrt()
    return PassAtKAdvantages(
        centred_PG.masked_fill(~valid_PG | is_void_P1, 0.0), deviation_P1.masked_fill(is_void_P1, 0.0)
    )


def has_zero_variance(rewards_PG: Tensor, valid_PG: Tensor) -> Tensor:
    """bool, per group: all valid rewards are equal (or none is valid), so that nothing can be learned from it."""
    highest_P = rewards_PG.masked_fill(~valid_PG, float("-inf")).amax(dim=1)
    lowest_P = rewards_PG.masked_fill(~valid_PG, float("inf")).amin(dim=1)
    return highest_P <= lowest_P


def _deviations(known_PG: Tensor, baseline: Tensor, valid_PG: Tensor, all_equal: Tensor) -> Tensor:
    return ((known_PG - baseline) * valid_PG).masked_fill(all_equal, 0.0)

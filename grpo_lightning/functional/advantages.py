"""Group-relative advantages: how much better a completion is than the others of its prompt."""

import torch
from torch import Tensor


def group_normalized_advantages(rewards_PG: Tensor, valid_PG: Tensor, *, ddof: int, epsilon: float) -> Tensor:
    r"""Advantages of outcome supervision, normalised within each group.

    .. math::
        \hat A_i = \frac{r_i - \operatorname{mean}(r)}{\operatorname{std}(r) + \epsilon}

    over the valid completions of a group. A completion that is not valid takes no part in the statistics and gets
    advantage 0; so does every completion of a group whose rewards are all equal, exactly and whatever the rounding.

    Args:
        rewards_PG: r, one per completion; entries that are not valid may hold anything, NaN included.
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


def group_centred(rewards_PG: Tensor, valid_PG: Tensor) -> Tensor:
    """Rewards less their group's mean, over the valid completions; 0 for the others and in groups of equal rewards."""
    known_PG = rewards_PG.masked_fill(~valid_PG, 0.0)
    mean_P1 = known_PG.sum(dim=1, keepdim=True) / valid_PG.sum(dim=1, keepdim=True).clamp(min=1)
    varies_P1 = ~has_zero_variance(rewards_PG, valid_PG)[:, None]
    return ((known_PG - mean_P1) * valid_PG).masked_fill(~varies_P1, 0.0)


def has_zero_variance(rewards_PG: Tensor, valid_PG: Tensor) -> Tensor:
    """bool, per group: all valid rewards are equal (or none is valid), so that nothing can be learned from it."""
    highest_P = rewards_PG.masked_fill(~valid_PG, float("-inf")).amax(dim=1)
    lowest_P = rewards_PG.masked_fill(~valid_PG, float("inf")).amin(dim=1)
    return highest_P <= lowest_P

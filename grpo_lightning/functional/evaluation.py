"""Estimators of what a policy can do, from several samples per prompt."""

import torch
from torch import Tensor


def pass_at_k(num_correct_P: Tensor, num_samples: int, k: int) -> Tensor:
    r"""Unbiased estimate, per prompt, of the probability that at least one of k samples is correct.

    .. math:: \text{pass@}k = 1 - \binom{n-c}{k} \Big/ \binom{n}{k}

    Args:
        num_correct_P: c, correct samples of each prompt.
        num_samples: n, samples of each prompt.
        k: In 1 .. n.

    Source: Chen et al. 2021, equation 1 (https://arxiv.org/abs/2107.03374).

    Example:
        >>> pass_at_k(torch.tensor([0, 1, 3]), num_samples=4, k=2).tolist()
        [0.0, 0.5, 1.0]
    """
    # 1 - prod_{i=n-c+1}^{n} (1 - k/i), which neither overflows nor subtracts large numbers.
    i_N = torch.arange(1, num_samples + 1, dtype=torch.float64, device=num_correct_P.device)
    factors_N = (1 - k / i_N).clamp(min=0.0)
    is_in_PN = i_N[None] > num_samples - num_correct_P[:, None]
    return 1 - torch.where(is_in_PN, factors_N[None], 1.0).prod(dim=1)


def majority_is_correct(answers: list[str | None], is_correct: list[bool]) -> float:
    """Whether the most frequent answer of some samples is correct; a tie gives the share of correct ones among it.

    Args:
        answers: The final answer of each sample; None, for no answer, never wins against an answer.
        is_correct: Whether each sample is correct.

    Example:
        >>> majority_is_correct(["4", "5", "4"], [True, False, True])
        1.0
        >>> majority_is_correct(["4", "5"], [True, False])
        0.5
    """
    votes: dict[str, list[bool]] = {}
    for answer, correct in zip(answers, is_correct, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(correct)
    if not votes:
        return 0.0
    most = max(map(len, votes.values()))
    winners = [all(correct) for correct in votes.values() if len(correct) == most]
    return sum(winners) / len(winners)

"""Estimators of how good a policy is at k samples, from n >= k samples per prompt."""

import torch
from torch import Tensor


def pass_at_k(num_samples_P: Tensor, num_correct_P: Tensor, *, k: int) -> Tensor:
    r"""Probability that at least one of k samples is correct, estimated without bias from n of which c are.

    .. math::
        \text{pass@}k = 1 - \binom{n-c}{k} \Big/ \binom{n}{k} = 1 - \prod_{j=0}^{k-1} \frac{n-c-j}{n-j}

    the share of the k-subsets of the samples that hold a correct one. The product of k factors in [0, 1] neither
    overflows nor cancels, unlike the binomials.

    Source: Chen et al. 2021, Evaluating Large Language Models Trained on Code, equation 1,
    https://arxiv.org/abs/2107.03374

    Args:
        num_samples_P: n of each prompt.
        num_correct_P: c of each prompt, 0 <= c <= n.
        k: >= 1.

    Returns:
        float64, shape P; NaN where n < k.

    Example:
        >>> pass_at_k(torch.tensor([4]), torch.tensor([1]), k=2)
        tensor([0.5000], dtype=torch.float64)
    """
    num_samples_P = num_samples_P.double()
    num_wrong_P = num_samples_P - num_correct_P
    drawn_k = torch.arange(k, dtype=torch.float64, device=num_samples_P.device)
    wrong_Pk = (num_wrong_P[:, None] - drawn_k).clamp(min=0)
    estimate_P = 1 - (wrong_Pk / (num_samples_P[:, None] - drawn_k).clamp(min=1)).prod(dim=1)
    return estimate_P.masked_fill(num_samples_P < k, float("nan"))


def majority_at_k(answers_PS: Tensor, correct_PS: Tensor, valid_PS: Tensor, *, k: int) -> Tensor:
    r"""Probability that the most frequent answer of k of the samples, drawn without replacement, is correct.

    A tie is broken uniformly. A sample without an answer is drawn like any other and votes for nothing; if nobody
    votes, the outcome is wrong. An answer is as correct as the share of its samples that are, which is 0 or 1 where
    correctness is a function of the answer. The average over all k-subsets is computed exactly: with :math:`n_a` the
    number of samples of answer a (:math:`n_\varnothing` of none) and :math:`r_a` its correctness,

    .. math::
        \text{maj@}k = \frac{1}{\binom{n}{k}} \sum_{m=1}^{k} [x^k] (1+x)^{n_\varnothing}
        \sum_{W \neq \emptyset} \frac{\sum_{a \in W} r_a}{|W|} \prod_{a \in W} \tbinom{n_a}{m} x^m
        \prod_{a \notin W} \sum_{i<m} \tbinom{n_a}{i} x^i

    where m is the number of votes of the winners W. All terms are positive, so nothing cancels.

    Args:
        answers_PS: int64, the answer of each of S samples as a number in [0, S); negative: no answer.
        correct_PS: bool.
        valid_PS: bool; False takes a sample out altogether, because its correctness is unknown.
        k: 1 <= k <= S.

    Returns:
        float64, shape P; NaN where fewer than k samples are valid.

    Example:
        Answers 5, 5, 7 of which 5 is right: the draws {5,5}, {5,7}, {5,7} win with probability 1, 1/2, 1/2.

        >>> answers, correct = torch.tensor([[0, 0, 1]]), torch.tensor([[True, True, False]])
        >>> majority_at_k(answers, correct, torch.ones(1, 3, dtype=torch.bool), k=2)
        tensor([0.6667], dtype=torch.float64)
    """
    if not len(answers_PS):
        return correct_PS.new_zeros(0, dtype=torch.float64)
    num_answers = answers_PS.shape[1]
    votes_PSA = (answers_PS[..., None] == torch.arange(num_answers, device=answers_PS.device)) & valid_PS[..., None]
    counts_PA = votes_PSA.sum(dim=1)
    correctness_PA = (votes_PSA & correct_PS[..., None]).sum(dim=1).double() / counts_PA.clamp(min=1)
    # Nobody gets more votes than the most frequent answer has samples, and answers without samples change nothing.
    counts_PA, order_PA = counts_PA.sort(dim=1, descending=True)
    most_votes, num_distinct = (int(n) for n in (counts_PA.amax(), (counts_PA > 0).any(dim=0).sum()))
    counts_PA, correctness_PA = counts_PA[:, :num_distinct], correctness_PA.gather(1, order_PA)[:, :num_distinct]

    weight_PAk = _binomial(counts_PA, k)
    start_Pk = _binomial((valid_PS & (answers_PS < 0)).sum(dim=1), k)
    num_subsets_P = _binomial(valid_PS.sum(dim=1), k)[:, k]
    won_P = torch.zeros_like(num_subsets_P)
    for votes in range(1, min(k, most_votes) + 1):
        won_P += _won_with(weight_PAk, correctness_PA, start_Pk, votes)
    return won_P / num_subsets_P.masked_fill(num_subsets_P == 0, float("nan"))


def _won_with(weight_PAk: Tensor, correctness_PA: Tensor, start_Pk: Tensor, votes: int) -> Tensor:
    """The number of k-subsets whose winners have `votes` votes, each weighted by its winners' mean correctness.

    The answers are taken in one after the other. ``subsets_Pkw[p, i, w]`` counts the subsets of i samples of the
    answers so far in which w answers have `votes` votes and none has more; ``correct_Pkw`` counts them weighted by
    the summed correctness of those w.
    """
    k = start_Pk.shape[1] - 1
    max_winners = k // votes
    subsets_Pkw = torch.nn.functional.pad(start_Pk[..., None], (0, max_winners))
    correct_Pkw = torch.zeros_like(subsets_Pkw)
    for answer in range(weight_PAk.shape[1]):
        below_Pkk = _convolution(weight_PAk[:, answer, :votes], k)
        winning_P11 = weight_PAk[:, answer, votes, None, None]
        gained_Pkw = correct_Pkw + correctness_PA[:, answer, None, None] * subsets_Pkw
        correct_Pkw = below_Pkk @ correct_Pkw + winning_P11 * _shift(gained_Pkw, votes)
        subsets_Pkw = below_Pkk @ subsets_Pkw + winning_P11 * _shift(subsets_Pkw, votes)
    num_winners_w = torch.arange(1, max_winners + 1, device=start_Pk.device)
    return (correct_Pkw[:, k, 1:] / num_winners_w).sum(dim=1)


def _binomial(n: Tensor, k: int) -> Tensor:
    """C(n, 0), ..., C(n, k) along a new last dimension; exact while they are below 2**53."""
    factors = [torch.ones_like(n, dtype=torch.float64)]
    for i in range(k):
        factors.append(factors[-1] * (n - i).clamp(min=0) / (i + 1))
    return torch.stack(factors, dim=-1)


def _convolution(kernel_Pm: Tensor, k: int) -> Tensor:
    """The (k+1) x (k+1) matrices that multiply a polynomial by another: ``matrix[i, j] = kernel[i - j]``."""
    lag_kk = torch.arange(k + 1, device=kernel_Pm.device)
    lag_kk = lag_kk[:, None] - lag_kk
    inside_kk = (lag_kk >= 0) & (lag_kk < kernel_Pm.shape[1])
    return kernel_Pm[:, lag_kk.clamp(0, kernel_Pm.shape[1] - 1)] * inside_kk


def _shift(counts_Pkw: Tensor, votes: int) -> Tensor:
    """One more winner, `votes` more samples."""
    return torch.nn.functional.pad(counts_Pkw, (1, 0, votes, 0))[:, : counts_Pkw.shape[1], : counts_Pkw.shape[2]]

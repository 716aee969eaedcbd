"""pass@k and maj@k: by hand, against enumeration of every subset, and as unbiased estimators."""

import doctest
import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import pytest
import torch

from grpo_lightning.functional import evaluation
from grpo_lightning.functional.evaluation import majority_at_k, pass_at_k


def majority(answers: Sequence[int], correct: Sequence[bool], k: int) -> float:
    tensors = torch.tensor([answers]), torch.tensor([correct]), torch.ones(1, len(answers), dtype=torch.bool)
    return majority_at_k(*tensors, k=k).item()


def enumerated_majority(answers: Sequence[int], correct: Sequence[bool], k: int) -> float:
    """Every subset, every tie: slow, and written without the formula."""
    mean = {a: sum(c for b, c in zip(answers, correct, strict=True) if b == a) / answers.count(a) for a in answers}
    outcomes = []
    for subset in combinations(range(len(answers)), k):
        votes = Counter(answers[i] for i in subset if answers[i] >= 0)
        winners = [a for a, n in votes.items() if n == max(votes.values())]
        outcomes.append(sum(mean[a] for a in winners) / len(winners) if winners else 0.0)
    return sum(outcomes) / len(outcomes)


def test_pass_at_k_worked_by_hand() -> None:
    # n=4, c=1: the pairs without the correct sample are C(3,2)=3 of C(4,2)=6.
    n = torch.tensor([4, 4, 4, 4, 2])
    c = torch.tensor([0, 1, 2, 3, 2])
    expected = torch.tensor([0.0, 3 / 6, 5 / 6, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(pass_at_k(n, c, k=2), expected, rtol=1e-15, atol=0)


def test_pass_at_1_is_the_share_of_correct_samples() -> None:
    torch.testing.assert_close(
        pass_at_k(torch.tensor([8, 3]), torch.tensor([3, 1]), k=1),
        torch.tensor([3 / 8, 1 / 3], dtype=torch.float64),
        rtol=1e-15,
        atol=1e-16,
    )


@pytest.mark.parametrize("k", [1, 2, 5, 10, 100])
def test_pass_at_k_equals_the_binomials_where_they_are_huge(k: int) -> None:
    n = 200
    exact = [1 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)]  # Python's integers do not overflow
    estimate = pass_at_k(torch.full((n + 1,), n), torch.arange(n + 1), k=k)
    torch.testing.assert_close(estimate, torch.tensor(exact, dtype=torch.float64), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("n", "k", "p"), [(1, 1, 0.3), (8, 1, 0.3), (8, 4, 0.1), (16, 8, 0.7)])
def test_pass_at_k_is_unbiased(n: int, k: int, p: float) -> None:
    # E over c ~ Binomial(n, p) of the estimate is 1 - (1 - p)^k.
    probability = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    estimate = pass_at_k(torch.full((n + 1,), n), torch.arange(n + 1), k=k)
    mean = (estimate * torch.tensor(probability, dtype=torch.float64)).sum().item()
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_pass_at_k_with_too_few_samples_is_nan() -> None:
    estimate = pass_at_k(torch.tensor([3, 4]), torch.tensor([3, 4]), k=4)
    assert estimate.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("answers", "correct", "k", "expected"),
    [
        ([0, 0, 1], [True, True, False], 3, 1.0),  # 2 to 1
        ([0, 0, 1], [True, True, False], 2, 2 / 3),  # {0,0} wins, {0,1} twice: half
        ([0, 0, 1], [False, False, True], 3, 0.0),  # the right answer is outvoted
        ([0, 1, 2], [True, False, False], 3, 1 / 3),  # a tie of three
        ([0, 0, 1, 1], [True, True, False, False], 4, 1 / 2),  # a tie of two
        ([0, -1, -1], [True, False, False], 3, 1.0),  # who abstains does not vote
        ([0, -1, -1], [True, False, False], 2, 2 / 3),  # {-1,-1}: nobody votes, wrong
        ([-1, -1], [False, False], 2, 0.0),
        ([0, 0, 1], [True, False, False], 3, 1 / 2),  # equal answers, half of them graded correct
    ],
)
def test_majority_at_k_worked_by_hand(answers: list[int], correct: list[bool], k: int, expected: float) -> None:
    assert majority(answers, correct, k) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("seed", range(6))
def test_majority_at_k_equals_the_enumeration_of_all_subsets(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = 9
    answers = torch.randint(-1, 4, (n,), generator=generator).tolist()
    right = torch.randint(0, 4, (1,), generator=generator).item()
    correct = [a == right for a in answers]
    if seed % 2:  # correctness need not be a function of the answer
        correct = (torch.rand(n, generator=generator) < 0.5).tolist()
    for k in range(1, n + 1):
        assert majority(answers, correct, k) == pytest.approx(enumerated_majority(answers, correct, k), abs=1e-12)


def test_majority_of_one_is_the_share_of_correct_answers() -> None:
    assert majority([3, 1, 3, 0, -1], [True, False, True, False, False], 1) == pytest.approx(2 / 5, abs=1e-15)


def test_prompts_do_not_influence_each_other_and_order_is_irrelevant() -> None:
    answers = torch.tensor([[0, 0, 1, 2], [1, 1, 1, -1], [2, 0, 1, 0]])
    correct = answers == torch.tensor([[0], [1], [0]])
    valid = torch.ones(3, 4, dtype=torch.bool)
    together = majority_at_k(answers, correct, valid, k=3)
    alone = torch.cat(
        [majority_at_k(a[None], c[None], v[None], k=3) for a, c, v in zip(answers, correct, valid, strict=True)]
    )
    assert torch.equal(together, alone)
    assert together[0].item() == pytest.approx(together[2].item(), abs=1e-15)  # the same votes, shuffled and renamed


def test_an_invalid_sample_is_as_if_never_drawn() -> None:
    answers = torch.tensor([[0, 0, 1, 1]])
    valid = torch.tensor([[True, True, True, False]])
    correct = answers == 0
    assert majority_at_k(answers, correct, valid, k=3).item() == 1.0
    assert majority_at_k(answers, correct, valid, k=2).item() == pytest.approx(2 / 3, abs=1e-15)
    assert majority_at_k(answers, correct, valid, k=4).isnan().all()


def test_no_prompts_give_no_estimates() -> None:
    nothing = torch.empty(0, 4, dtype=torch.int64)
    assert majority_at_k(nothing, nothing.bool(), nothing.bool(), k=2).shape == (0,)
    assert pass_at_k(nothing[:, 0], nothing[:, 0], k=2).shape == (0,)


def test_sixty_four_samples_are_cheap_and_exact() -> None:
    answers = torch.arange(64)[None] % 5  # 13, 13, 13, 13, 12 votes: a tie of four
    estimate = majority_at_k(answers, answers == 0, torch.ones(1, 64, dtype=torch.bool), k=64)
    assert estimate.item() == pytest.approx(1 / 4, abs=1e-12)


def test_the_examples_of_the_docstrings_hold() -> None:
    results = doctest.testmod(evaluation)
    assert results.attempted >= 3
    assert results.failed == 0

"""Objectives beyond the reward of one attempt: maximum likelihood, and success in any of k attempts."""

from dataclasses import dataclass
from math import comb, sqrt
from typing import ClassVar

import torch
from enumeration import BINARY, SEQUENCES, Expectation, far, shortfall, worst
from mutants import keyword, replaced, swapped_ddof, wrong_sign

from grpo_lightning.functional.advantages import pass_at_k_advantages
from grpo_lightning.functional.evaluation import pass_at_k
from grpo_lightning.objective import (
    GroupMean,
    GroupMeanReward,
    GroupStd,
    NoRatio,
    Objective,
    OutcomeAdvantage,
    PassAtK,
    Reinforce,
    SequenceSum,
)

POLICY = SEQUENCES.policy(1)
P = (SEQUENCES.probabilities(POLICY) * BINARY).sum().item()
SLOPE = SEQUENCES.gradient_of_mean(POLICY, BINARY)
"""The gradient of p."""


def build(advantage, scale=None):
    return Objective(
        advantage=advantage, scale=scale, ratio=NoRatio(), surrogate=Reinforce(), aggregation=SequenceSum()
    )


def drawn(group_size):
    return Expectation(policy=POLICY, rewards=BINARY, group_size=group_size)


def slope_of_pass_at(k):
    """1 - (1 - p)^k, differentiated."""
    return k * (1 - P) ** (k - 1) * SLOPE


def test_dividing_by_the_mean_ascends_the_likelihood_of_success(prove):
    def error():
        errors = []
        for g in (2, 3, 4):
            got = drawn(g).ascent(build(GroupMean(), GroupMeanReward()))
            errors += [
                far(got, sum(slope_of_pass_at(k) / k for k in range(1, g))),
                far(got, sum((1 - P) ** k for k in range(g - 1)) * SLOPE),
                shortfall(far(got, sum(slope_of_pass_at(k) / k for k in range(1, g + 1))), 1e-3),
            ]
        return worst(errors)

    prove(
        "(r - mean)/mean: the sum of grad pass@k / k over k < G, the log-likelihood to order G - 1 (not G)",
        "MaxRL, section 4",
        error,
        replaced(
            "a mean of 1", "objective.scale.group_mean", lambda rewards_PG, valid_PG: torch.ones(len(rewards_PG), 1)
        ),
        wrong_sign("objective.scale.group_mean"),
    )


@dataclass(frozen=True, kw_only=True)
class Undivided(OutcomeAdvantage):
    """The advantages of pass@k before they are divided by their deviation."""

    k: int
    compares_totals: ClassVar[bool] = False

    def __call__(self, groups):
        return pass_at_k_advantages(groups.rewards_PG > 0, groups.valid_PG, k=self.k).centred_PG


SIZES = ((2, 1), (3, 2), (4, 1), (4, 2), (4, 3))


def test_pass_at_k_advantages_ascend_pass_at_k(prove):
    def error():
        return worst(
            far(drawn(g).ascent(build(Undivided(k=k))), (1 / k - 1 / g) * slope_of_pass_at(k)) for g, k in SIZES
        )

    prove(
        "the advantages of pass@k, undivided: (1/k - 1/G) times the gradient of pass@k",
        "Pass@k Training, section 2.3",
        error,
        keyword("failures among k, not k - 1, others", "functional.advantages.pass_at_k", k=lambda k: max(k, 1)),
    )


def test_divided_pass_at_k_advantages_have_the_paper_s_values(prove):
    def factor(g, k):
        """By the paper's binomials: right completions have the mean score grad p / p, wrong ones -grad p / (1 - p)."""
        total = 0.0
        for right in range(1, g):
            wrong = g - right
            mean = 1 - comb(wrong, k) / comb(g, k)
            deviation = sqrt(mean * (1 - mean))
            if deviation == 0:
                continue
            good = (1 - mean) / deviation
            bad = (1 - mean - comb(wrong - 1, k - 1) / comb(g - 1, k - 1)) / deviation
            chance = comb(g, right) * P**right * (1 - P) ** wrong
            total += chance * (right * good / P - wrong * bad / (1 - P)) / g
        return total

    def error():
        errors = []
        for g, k in SIZES:
            objective = build(PassAtK(k=k, threshold=1.0, epsilon=0.0))
            advantages = drawn(g).advantages(objective, objective.coefficients).view(-1, g)
            errors += [
                far(advantages.sum(dim=1), torch.zeros(())),
                far(drawn(g).ascent(objective), factor(g, k) * SLOPE),
            ]
        return worst(errors)

    prove(
        "the advantages of pass@k sum to 0 in every group, and their update has the paper's binomials",
        "Pass@k Training, section 2.3",
        error,
        keyword("failures among k, not k - 1, others", "functional.advantages.pass_at_k", k=lambda k: max(k, 1)),
        keyword("k + 1 attempts", "objective.advantage.pass_at_k_advantages", k=lambda k: k + 1),
    )


def test_one_attempt_is_the_group_s_own_deviation(prove):
    def error():
        one, std = build(PassAtK(k=1, threshold=1.0, epsilon=0.0)), build(GroupMean(), GroupStd(ddof=0, epsilon=0.0))
        return worst(
            far(drawn(g).advantages(one, one.coefficients), drawn(g).advantages(std, std.coefficients))
            for g in (2, 3, 4)
        )

    prove(
        "the advantages of pass@1: GRPO's over the population's deviation",
        "Pass@k Training, section 2.3",
        error,
        swapped_ddof("objective.scale.group_std"),
    )


def test_the_estimate_of_pass_at_k_is_unbiased(prove):
    def error():
        errors = []
        for n, k in ((4, 1), (4, 3), (8, 4), (10, 10)):
            counts = torch.arange(n + 1)
            estimates = pass_at_k(torch.full_like(counts, n), counts, k=k).tolist()
            for p in (0.07, 0.5, 0.9):
                mean = sum(comb(n, c) * p**c * (1 - p) ** (n - c) * estimates[c] for c in range(n + 1))
                errors.append(abs(mean - (1 - (1 - p) ** k)))
            # The same function is what the advantages are made of.
            correct = counts[:, None] > torch.arange(n)
            advantages = pass_at_k_advantages(correct, torch.ones_like(correct), k=k).centred_PG
            errors += [abs(1 - advantages[c, 0].item() - estimates[c]) for c in range(1, n)]
        return worst(errors)

    def with_replacement(num_samples_P, num_correct_P, *, k):
        return 1 - (1 - num_correct_P / num_samples_P.double()) ** k

    prove(
        "1 - C(n - c, k)/C(n, k) has the expectation 1 - (1 - p)^k",
        "Evaluating Large Language Models Trained on Code, equation 1",
        error,
        replaced("drawn with replacement", "functional.advantages.pass_at_k", with_replacement),
        tolerance=1e-12,
    )

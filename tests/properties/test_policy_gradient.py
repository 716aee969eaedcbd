"""The policy gradient: what each baseline, scale and aggregation makes of its expectation."""

from math import comb, sqrt

import torch
from enumeration import BINARY, GRADED, SEQUENCES, Expectation, far, gradient, one_minus_cosine, shortfall, worst
from mutants import Mutant, mask_off_by_one, replaced, swapped_ddof, wrong_sign
from objective_cases import scored

from grpo_lightning.functional.advantages import group_centred
from grpo_lightning.objective import (
    AdvantageStd,
    BatchMean,
    BatchStd,
    ConstantLength,
    GroupMean,
    GroupMeanReward,
    GroupStd,
    LeaveOneOut,
    LengthWeightedMean,
    NoBaseline,
    NoRatio,
    Objective,
    PassAtK,
    PerReward,
    PromptMeanTokenMean,
    Reinforce,
    SequenceMeanTokenMean,
    SequenceSum,
    SignalShare,
    TokenMean,
    TokenWhitened,
    Whitened,
)

POLICY = SEQUENCES.policy(0)
LIKELIHOOD = "objective.surrogate.log_likelihood"
SEQUENCE_SUM = "objective.aggregation.sequence_sum"
SIZES = (2, 3, 4)


def reinforce(advantage, scale=None, aggregation=None):
    return Objective(
        advantage=advantage,
        scale=scale,
        ratio=NoRatio(),
        surrogate=Reinforce(),
        aggregation=aggregation or SequenceSum(),
    )


def drawn(rewards, group_size):
    return Expectation(policy=POLICY, rewards=rewards, group_size=group_size)


def test_the_expected_score_is_zero(prove):
    def error():
        probabilities_Y = SEQUENCES.probabilities(POLICY)
        score = drawn(torch.ones(7, dtype=torch.float64), 2).ascent(reinforce(NoBaseline()))
        return worst(abs(probabilities_Y.sum().item() - 1), far(score, torch.zeros_like(score)))

    prove(
        "probabilities sum to 1, and the expected gradient of the log-probability is 0",
        "Williams 1992",
        error,
        mask_off_by_one(SEQUENCE_SUM),
    )


def test_without_a_baseline_the_update_is_the_policy_gradient(prove):
    def error():
        got = drawn(GRADED, 2).ascent(reinforce(NoBaseline()))
        probabilities_Y = SEQUENCES.probabilities(POLICY)
        by_scores = gradient(
            lambda leaf: (probabilities_Y * GRADED * SEQUENCES.probabilities(leaf).log()).sum(), POLICY
        )
        return worst(far(got, SEQUENCES.gradient_of_mean(POLICY, GRADED)), far(got, by_scores))

    prove(
        "REINFORCE, summed over a completion: the gradient of the expected reward",
        "Williams 1992",
        error,
        wrong_sign(LIKELIHOOD),
        mask_off_by_one(SEQUENCE_SUM),
    )


def test_the_update_is_the_difference_quotient_of_the_expected_reward(prove):
    def error():
        step, got = 1e-6, drawn(GRADED, 2).ascent(reinforce(NoBaseline()))
        shifts = step * torch.eye(9, dtype=torch.float64).view(9, 3, 3)
        quotients = [
            ((SEQUENCES.probabilities(POLICY + s) - SEQUENCES.probabilities(POLICY - s)) * GRADED).sum() / (2 * step)
            for s in shifts
        ]
        return far(got, torch.stack(quotients).view(3, 3))

    # Central differences with h = 1e-6: the truncation is h^2, the rounding 1e-16 / h.
    prove(
        "REINFORCE against central differences of the expected reward",
        "Williams 1992",
        error,
        wrong_sign(LIKELIHOOD),
        tolerance=1e-9,
    )


def test_the_group_mean_shortens_the_policy_gradient(prove):
    def error():
        want = SEQUENCES.gradient_of_mean(POLICY, GRADED)
        return worst(far(drawn(GRADED, g).ascent(reinforce(GroupMean())), (1 - 1 / g) * want) for g in SIZES)

    prove(
        "the group's mean as baseline, no scale: (1 - 1/G) times the policy gradient",
        "DeepSeekMath, section 4.1.2",
        error,
        replaced("no baseline", "objective.advantage.group_centred", lambda rewards_PG, valid_PG: rewards_PG),
        wrong_sign("objective.advantage.group_centred"),
    )


def test_leaving_one_out_is_the_policy_gradient(prove):
    def error():
        want = SEQUENCES.gradient_of_mean(POLICY, GRADED)
        errors = []
        for g in SIZES:
            at = drawn(GRADED, g)
            loo, mean = reinforce(LeaveOneOut()), reinforce(GroupMean())
            longer = g / (g - 1) * at.advantages(mean, mean.coefficients)
            errors += [far(at.ascent(loo), want), far(at.advantages(loo, loo.coefficients), longer)]
        return worst(errors)

    prove(
        "the mean of the others as baseline: the policy gradient exactly; G/(G-1) times the group's mean",
        "RLOO, equation 8",
        error,
        replaced("the completion itself in its baseline", "objective.advantage.leave_one_out_centred", group_centred),
    )


def test_the_group_deviation_ascends_another_function(prove):
    def factor(p, g):
        """kappa = E_K[sqrt(K/G (1 - K/G))] / (p (1 - p)), K binomial: the mean deviation over the variance."""
        mean = sum(comb(g, k) * p**k * (1 - p) ** (g - k) * sqrt(k / g * (1 - k / g)) for k in range(g + 1))
        return mean / (p * (1 - p))

    def error():
        p = (SEQUENCES.probabilities(POLICY) * BINARY).sum().item()
        slope = SEQUENCES.gradient_of_mean(POLICY, BINARY)
        errors = [abs(factor(p, 2) - 1)]
        for g in SIZES:
            population = drawn(BINARY, g).ascent(reinforce(GroupMean(), GroupStd(ddof=0, epsilon=0.0)))
            sample = drawn(BINARY, g).ascent(reinforce(GroupMean(), GroupStd(ddof=1, epsilon=0.0)))
            errors += [
                far(population, factor(p, g) * slope),
                far(sample, sqrt((g - 1) / g) * factor(p, g) * slope),
            ]
        return worst(errors)

    prove(
        "rewards 0 and 1 over the group's deviation: E[std]/(p(1-p)) times the gradient of p; by ddof 1 sqrt((G-1)/G)",
        "DeepSeekMath, section 4.1.2",
        error,
        swapped_ddof("objective.scale.group_std"),
    )


def test_large_groups_ascend_the_arcsine_of_the_root(prove):
    def slope(p, g):
        """Of the expected update in p: the groups with k of g right, by the framework's own advantages."""
        rewards_PG = (torch.arange(g) < torch.arange(g + 1)[:, None]).double()
        objective = reinforce(GroupMean(), GroupStd(ddof=0, epsilon=0.0))
        groups = scored(rewards_PG.tolist())
        advantages_PG = objective.advantages(groups, objective.coefficients).view_as(rewards_PG)
        # d log p = dp / p for what is right, d log (1 - p) = -dp / (1 - p) for what is wrong.
        of_group = (advantages_PG * torch.where(rewards_PG > 0, 1 / p, -1 / (1 - p))).mean(dim=1)
        weights = [comb(g, k) * p**k * (1 - p) ** (g - k) for k in range(g + 1)]
        return (torch.tensor(weights, dtype=torch.float64) * of_group).sum().item()

    def error():
        errors = []
        for p in (0.2, 0.5, 0.7):
            # d/dp 2 arcsin sqrt(p) = 1 / sqrt(p (1 - p)); the mean deviation falls short by 1 / (8 G p (1 - p)).
            limit, first_order = 1 / sqrt(p * (1 - p)), 1 / (8 * p * (1 - p))
            errors += [abs(slope(p, g) / limit - 1 + first_order / g) * g**2 for g in (100, 200)]
        return worst(errors)

    # What is left is of second order, in units of 1 / G^2: 1.4 at p = 0.2.
    prove(
        "with many completions a group the update over the deviation is that of 2 arcsin sqrt(p), to 1/G",
        "DeepSeekMath, section 4.1.2",
        error,
        Mutant(
            "the variance for the deviation", "objective.scale.group_std", lambda f: lambda *a, **k: f(*a, **k) ** 2
        ),
        swapped_ddof("objective.scale.group_std"),
        tolerance=4.0,
        caught_factor=5,
    )


def test_a_constant_length_keeps_the_direction_and_others_do_not(prove):
    def error():
        want = SEQUENCES.gradient_of_mean(POLICY, GRADED)
        at = drawn(GRADED, 3)
        constant = at.ascent(reinforce(GroupMean(), aggregation=ConstantLength(length=5.0)))
        turned = [
            shortfall(one_minus_cosine(at.ascent(reinforce(GroupMean(), aggregation=aggregation)), want), 1e-5)
            for aggregation in (SequenceMeanTokenMean(), TokenMean(), PromptMeanTokenMean())
        ]
        return worst(far(constant, (1 - 1 / 3) / 5 * want), *turned)

    def length_mean(values_BT, mask_BT, *, num_sequences):
        return (values_BT.masked_fill(~mask_BT, 0.0).sum(1) / mask_BT.sum(1)).sum() / num_sequences

    def whole_sum(values_BT, mask_BT, *args, **kwargs):
        return values_BT.masked_fill(~mask_BT, 0.0).sum()

    prove(
        "a constant denominator keeps the direction of the policy gradient; 1/|o| and the two token means turn it",
        "Dr. GRPO, section 3",
        error,
        replaced("1/|o| for the constant", SEQUENCE_SUM, length_mean),
        replaced("no 1/|o|", "objective.aggregation.sequence_mean_token_mean", whole_sum),
        tolerance=1e-10,
    )


def test_a_reward_of_nothing_teaches_nothing(prove):
    def error():
        sums = []
        for bits in range(8):
            rewards_G = torch.tensor([bits >> i & 1 for i in range(3)], dtype=torch.float64)
            at = drawn(rewards_G.expand(343, 3), 3)
            parts = ((GroupMean(), GroupStd(ddof=1, epsilon=1e-6)), (LeaveOneOut(), None), (NoBaseline(), None))
            sums += [at.ascent(reinforce(*part)).abs().max().item() for part in parts]
        return worst(sums)

    prove(
        "a reward that does not depend on the completion: the expected update is 0",
        "Williams 1992",
        error,
        mask_off_by_one(SEQUENCE_SUM),
    )


COMPARING = (
    (GroupMean(), None),
    (GroupMean(), GroupStd(ddof=1, epsilon=0.0)),
    (GroupMean(), BatchStd(ddof=0, epsilon=0.0)),
    (GroupMean(), AdvantageStd(ddof=1, epsilon=0.0)),
    (GroupMean(), GroupMeanReward()),
    (GroupMean(), SignalShare()),
    (LeaveOneOut(), None),
    (LengthWeightedMean(), None),
    (BatchMean(), None),
    (NoBaseline(), Whitened(ddof=1, epsilon=0.0)),
    (NoBaseline(), TokenWhitened(ddof=0, epsilon=0.0)),
    (PerReward(ddof=1, epsilon=0.0), None),
    (PassAtK(k=2, threshold=0.5, epsilon=0.0), None),
)


def test_equal_rewards_teach_exactly_nothing(prove):
    def error():
        at = [drawn(torch.full((7,), reward, dtype=torch.float64), 3) for reward in (0.1, 0.7)]
        updates = [part.ascent(reinforce(*compared)) for part in at for compared in COMPARING]
        return far(torch.stack(updates), torch.zeros(3, 3))

    prove(
        "equal rewards, by every baseline and scale: an update of exactly 0, and no NaN",
        "DeepSeekMath, section 4.1.2",
        error,
        # The mean of three times 0.1 is not 0.1.
        replaced(
            "differences that are only rounding",
            "functional.advantages.has_zero_variance",
            lambda rewards_PG, valid_PG: torch.zeros(len(rewards_PG), dtype=torch.bool),
        ),
        replaced("0/0", "objective.credit.scaled", torch.div),
        tolerance=0.0,
    )

"""Advantages: sums, invariances, what depends on what, and which baseline has the least variance."""

from dataclasses import replace

import torch
from enumeration import BINARY, GRADED, SEQUENCES, Expectation, far, shortfall, worst
from mutants import Mutant, replaced, swapped_ddof
from objective_cases import NAN, scored

from grpo_lightning.functional.advantages import batch_centred, group_centred
from grpo_lightning.groups import DropZeroVariance
from grpo_lightning.objective import (
    AdvantageStd,
    BatchMean,
    BatchStd,
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
    ProcessSupervision,
    Reinforce,
    SequenceMeanTokenMean,
    SequenceSum,
    SignalShare,
    TokenMean,
    TokenRatio,
    TokenWhitened,
    TwoSidedClipped,
    Whitened,
)
from grpo_lightning.types import CompletionTokens

POPULATION, SAMPLE = GroupStd(ddof=0, epsilon=0.0), GroupStd(ddof=1, epsilon=0.0)
BY_GROUP = (
    (GroupMean(), None),
    (GroupMean(), POPULATION),
    (GroupMean(), SAMPLE),
    (GroupMean(), GroupMeanReward()),
    (LeaveOneOut(), None),
    (LengthWeightedMean(), None),
    (NoBaseline(), None),
    (PassAtK(k=2, threshold=0.5, epsilon=0.0), None),
    (PerReward(ddof=1, epsilon=0.0), None),
)
BY_BATCH = (
    (GroupMean(), BatchStd(ddof=1, epsilon=0.0)),
    (GroupMean(), AdvantageStd(ddof=0, epsilon=0.0)),
    (GroupMean(), SignalShare()),
    (BatchMean(), None),
    (NoBaseline(), Whitened(ddof=1, epsilon=0.0)),
    (NoBaseline(), TokenWhitened(ddof=0, epsilon=0.0)),
)


def build(advantage, scale=None, aggregation=None):
    return Objective(
        advantage=advantage,
        scale=scale,
        ratio=NoRatio(),
        surrogate=Reinforce(),
        aggregation=aggregation or SequenceSum(),
    )


def assign(groups, advantage, scale=None, **where):
    objective = build(advantage, scale)
    return objective.advantages(groups, objective.coefficients, **where).view_as(groups.rewards_PG)


def random_groups(num_groups=6, group_size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(num_groups, group_size, dtype=torch.float64, generator=generator)
    lengths = torch.randint(1, 9, (num_groups, group_size), generator=generator)
    return scored(rewards.tolist(), lengths=lengths.tolist())


def take(groups, rows):
    """The same with these groups, under slots that rise."""
    parts = {name: getattr(groups, name)[rows] for name in ("rewards_PG", "valid_PG", "values_PGK", "lengths_PG")}
    return replace(groups, slots_P=groups.slots_P[: len(rows)], **parts)


def test_advantages_of_a_group_sum_to_zero_and_have_its_size_as_square(prove):
    def error():
        groups, errors = random_groups(), []
        for scale in (None, POPULATION, SAMPLE):
            errors.append(assign(groups, GroupMean(), scale).sum(dim=1).abs().max().item())
        for scale, want in ((POPULATION, 4.0), (SAMPLE, 3.0)):
            errors.append(far(assign(groups, GroupMean(), scale).square().sum(dim=1), torch.tensor(want)))
        return worst(errors)

    prove(
        "sum of A = 0; over the deviation, sum of A squared = G by ddof 0 and G - 1 by ddof 1",
        "DeepSeekMath, section 4.1.2",
        error,
        swapped_ddof("objective.scale.group_std"),
        replaced("the mean of the batch", "objective.advantage.group_centred", batch_centred),
    )


def test_units_of_the_reward(prove):
    def error():
        groups = random_groups()
        errors = []
        for factor, shift in ((3.0, -2.0), (-0.5, 4.0)):
            moved = replace(groups, rewards_PG=factor * groups.rewards_PG + shift)
            sign = 1 if factor > 0 else -1
            errors += [
                far(assign(moved, GroupMean(), SAMPLE), sign * assign(groups, GroupMean(), SAMPLE)),
                far(assign(moved, LeaveOneOut()), factor * assign(groups, LeaveOneOut())),
                far(assign(moved, GroupMean()), factor * assign(groups, GroupMean())),
                far(assign(moved, LengthWeightedMean()), factor * assign(groups, LengthWeightedMean())),
            ]
        return worst(errors)

    prove(
        "A(a r + b) = sign(a) A(r) over the deviation, a A(r) without a scale",
        "DeepSeekMath, section 4.1.2; Dr. GRPO; RLOO; OPO",
        error,
        replaced("no baseline", "objective.advantage.group_centred", lambda rewards_PG, valid_PG: rewards_PG),
        Mutant("variance for deviation", "objective.scale.group_std", lambda f: lambda *a, **k: f(*a, **k) ** 2),
    )


def test_order_does_not_enter(prove):
    def error():
        groups, errors = random_groups(), []
        within, across = torch.tensor([2, 0, 3, 1]), torch.tensor([4, 0, 5, 2, 1, 3])
        mixed = take(groups, across)
        mixed = replace(
            mixed, **{name: getattr(mixed, name)[:, within] for name in ("rewards_PG", "values_PGK", "lengths_PG")}
        )
        for parts in BY_GROUP + BY_BATCH:
            errors.append(far(assign(mixed, *parts), assign(groups, *parts)[across][:, within]))
        return worst(errors)

    def first_counts_double(rewards_PG, valid_PG):
        return rewards_PG - (rewards_PG.sum(dim=1, keepdim=True) + rewards_PG[:, :1]) / 5

    prove(
        "completions of a group, and groups, in another order: the same advantages in that order",
        "DeepSeekMath, section 4.1.2",
        error,
        replaced("a baseline that depends on the order", "objective.advantage.group_centred", first_counts_double),
    )


def test_groups_do_not_know_of_each_other(prove):
    def error():
        groups, errors = random_groups(), []
        for row in range(len(groups.slots_P)):
            alone = take(groups, torch.tensor([row]))
            errors += [far(assign(alone, *parts), assign(groups, *parts)[row]) for parts in BY_GROUP]
        half = take(groups, torch.arange(3))
        errors += [shortfall(far(assign(half, *parts), assign(groups, *parts)[:3]), 1e-3) for parts in BY_BATCH[:2]]
        return worst(errors)

    prove(
        "a group's advantages are the same to the last bit whatever the others are; batch scales are not",
        "DeepSeekMath, section 4.1.2",
        error,
        replaced("the mean of the batch", "objective.advantage.group_centred", batch_centred),
        Mutant("the batch's deviation", "objective.scale.group_std", lambda f: lambda *a, **k: f(*a, **k).mean()),
        tolerance=0.0,
    )


def test_ranks_are_one_batch(prove):
    def error():
        groups, errors = random_groups(), []
        shares = (torch.tensor([0, 3, 4]), torch.tensor([1, 2, 5]))
        ranks = [replace(take(groups, rows), slots_P=groups.slots_P[rows]) for rows in shares]
        for advantage, scale in BY_GROUP + BY_BATCH:
            together = assign(groups, advantage, scale)
            sent = []
            for rank in ranks:  # what each rank hands to the collective
                assign(rank, advantage, scale, gather=lambda rows, to=sent: to.append(rows) or rows)
            everyone = torch.cat(sent)
            for rank, rows in zip(ranks, shares, strict=True):
                errors.append(far(assign(rank, advantage, scale, gather=lambda _, all_=everyone: all_), together[rows]))
        return worst(errors)

    def by_itself(of):
        return lambda mine, gather: (of(mine, gather), of(mine, lambda rows: rows))[1]

    def first_rows(of):
        def mutated(mine, gather):
            ranks = of(mine, gather)
            return replace(ranks, mine_P=torch.arange(len(ranks.mine_P)))

        return mutated

    prove(
        "groups on two ranks: the advantages of one rank, also with means and deviations of the batch",
        "REINFORCE++, equation 10; Lite PPO, section 4.1",
        error,
        Mutant("each rank by itself", "objective.credit.AllRanks.of", by_itself),
        Mutant("the first rows, not its own", "objective.credit.AllRanks.of", first_rows),
        tolerance=1e-12,
    )


def test_a_completion_without_a_reward_is_not_there(prove):
    def error():
        whole, errors = random_groups(), []
        missing = replace(whole, rewards_PG=whole.rewards_PG.clone(), valid_PG=whole.valid_PG.clone())
        missing.rewards_PG[:, 1], missing.valid_PG[:, 1] = NAN, False
        missing = replace(missing, values_PGK=missing.rewards_PG[..., None])
        others = torch.tensor([0, 2, 3])
        names = ("rewards_PG", "valid_PG", "values_PGK", "lengths_PG")
        smaller = replace(whole, **{name: getattr(whole, name)[:, others] for name in names})
        for parts in BY_GROUP + BY_BATCH:
            got = assign(missing, *parts)
            errors += [far(got[:, others], assign(smaller, *parts)), far(got[:, 1], torch.zeros(()))]
        return worst(errors)

    def as_zero(centred):
        def mutated(rewards_PG, valid_PG):
            return centred(rewards_PG.nan_to_num(0.0), torch.ones_like(valid_PG))

        return mutated

    prove(
        "a completion whose reward failed: advantage 0, and the others' as if it had not been drawn",
        "every baseline and scale",
        error,
        Mutant("a failure counted as a reward of 0", "objective.advantage.group_centred", as_zero),
        Mutant(
            "the same, in the deviation",
            "objective.scale.group_std",
            lambda f: lambda r, v, **k: as_zero(lambda rewards_PG, valid_PG: f(rewards_PG, valid_PG, **k))(r, v),
        ),
        tolerance=1e-12,
    )


def steps(scores, ends, length):
    """Tokens of a group of completions of one length, with the scores of their steps at the steps' ends."""
    scores_BT = torch.zeros(len(scores), length, dtype=torch.float64)
    is_step_BT = torch.zeros(len(scores), length, dtype=torch.bool)
    for row, (values, positions) in enumerate(zip(scores, ends, strict=True)):
        for value, position in zip(values, positions, strict=True):
            scores_BT[row, position], is_step_BT[row, position] = value, True
    return CompletionTokens(torch.ones_like(is_step_BT), scores_BT, is_step_BT, None, None)


def process(scores, ends, *, length, ddof):
    objective = Objective(
        advantage=ProcessSupervision(ddof=ddof, epsilon=0.0),
        scale=None,
        ratio=TokenRatio(),
        surrogate=TwoSidedClipped(clip_low=0.2, clip_high=0.2, delta=4.0),
        aggregation=TokenMean(),
    )
    groups = scored([[sum(values) for values in scores]])
    return objective.advantages(groups, objective.coefficients, tokens=steps(scores, ends, length))


def test_steps_are_credited_with_what_follows(prove):
    def error():
        # The pool 1, 0, 1, 1: mean 3/4, variance 3/16. A good step is 1/sqrt(3), the bad one -sqrt(3).
        good, bad = 3**-0.5, -(3**0.5)
        got = process([(1.0, 0.0), (1.0, 1.0)], [(1, 3), (0, 2)], length=4, ddof=0)
        want = [[good + bad, good + bad, bad, bad], [2 * good, good, good, 0.0]]
        outcome = assign(scored([[0.3, 1.2, -0.4]]), GroupMean(), SAMPLE)
        last = process([(0.3,), (1.2,), (-0.4,)], [(3,), (3,), (3,)], length=4, ddof=1)
        return worst(
            far(got, torch.tensor(want, dtype=torch.float64)),
            abs(2 * got[0, 3].item() - bad * 2),
            abs(3 * good + bad),
            far(last, outcome.view(-1, 1)),
        )

    prove(
        "steps normalised over the group's pool, then summed from each token on; one last step is the outcome",
        "DeepSeekMath, section 4.1.3",
        error,
        replaced("the steps before", "objective.credit.suffix_sums", lambda values_BT: values_BT.cumsum(dim=-1)),
        replaced(
            "its own step left out",
            "objective.credit.suffix_sums",
            lambda values_BT: values_BT.flip(-1).cumsum(-1).flip(-1) - values_BT,
        ),
        swapped_ddof("objective.advantage.group_normalized_advantages"),
    )


def test_rewards_that_are_normalised_apart_stay_apart(prove):
    def error():
        values = [[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0]], [[1.0, 3.0], [0.0, 1.0], [2.0, 0.0], [0.5, 1.0]]]
        groups = scored([[sum(pair) for pair in group] for group in values], values=values, weights=(1.0, 1.0))
        merged, apart = assign(groups, GroupMean(), SAMPLE), assign(groups, PerReward(ddof=1, epsilon=0.0))
        # The columns have sample deviations 1/2 and sqrt(1/3), and means 1/4 and 1/2.
        by_hand = [0.75 / 0.5 - 0.5 * 3**0.5, -0.25 / 0.5 + 0.5 * 3**0.5]
        whitened = assign(groups, PerReward(ddof=1, epsilon=0.0), Whitened(ddof=1, epsilon=0.0))
        return worst(
            abs(merged[0, 0].item() - merged[0, 1].item()),
            abs(apart[0, 0].item() - by_hand[0]),
            abs(apart[0, 1].item() - by_hand[1]),
            abs(whitened.mean().item()),
            abs(whitened.std().item() - 1),
        )

    prove(
        "(1, 0) and (0, 1) are equal to GRPO and distinct to GDPO, whose batch then has mean 0 and deviation 1",
        "GDPO, equations 4 to 6",
        error,
        swapped_ddof("functional.advantages.group_normalized_advantages"),
        swapped_ddof("objective.advantage.per_reward_normalized"),
    )


def scores_of_completions():
    """The gradient of log pi(y), [Y, S * V], and pi(y), [Y, 1]."""
    policy = SEQUENCES.policy(0)
    slopes = [SEQUENCES.gradient_of_mean(policy, one_Y) for one_Y in torch.eye(7, dtype=torch.float64)]
    probabilities_Y1 = SEQUENCES.probabilities(policy)[:, None]
    return torch.stack(slopes).flatten(1) / probabilities_Y1, probabilities_Y1


def variance(baseline):
    """Of the update of a single completion, r less this baseline, over the policy."""
    scores, probabilities_Y1 = scores_of_completions()
    updates = (GRADED - baseline)[:, None] * scores
    mean = (probabilities_Y1 * updates).sum(dim=0)
    return (probabilities_Y1 * (updates - mean).square()).sum().item()


def test_the_optimal_baseline_has_the_least_variance(prove):
    def error():
        lengths_Y = SEQUENCES.mask_YT.sum(dim=1)
        groups = scored([GRADED.tolist()], lengths=[lengths_Y.tolist()])
        baseline = (groups.rewards_PG - assign(groups, LengthWeightedMean()))[0]
        by_hand = (lengths_Y * GRADED).sum() / lengths_Y.sum()
        # The squared norms of the scores as weights make the baseline that no other betters.
        scores, probabilities_Y1 = scores_of_completions()
        weights_Y = (probabilities_Y1 * scores.square()).sum(dim=1)
        best, mean = (weights_Y * GRADED).sum() / weights_Y.sum(), (probabilities_Y1[:, 0] * GRADED).sum()
        least, others = variance(best), [variance(other) for other in (best - 0.1, best + 0.1, mean)]
        return worst(far(baseline, by_hand), *(shortfall(more - least, 1e-6) for more in others))

    prove(
        "the baseline weighted by length; weighted by squared scores, no baseline has less variance",
        "OPO, equations 4 and 5",
        error,
        Mutant(
            "not weighted",
            "objective.advantage.length_weighted_centred",
            lambda f: lambda rewards_PG, valid_PG, lengths_PG: group_centred(rewards_PG, valid_PG),
        ),
    )


def test_dropping_groups_without_a_signal_only_lengthens_the_update(prove):
    def error():
        errors = []
        for g in (2, 3):
            at = Expectation(policy=SEQUENCES.policy(0), rewards=BINARY, group_size=g)
            p = (SEQUENCES.probabilities(at.policy) * BINARY).sum().item()
            mixed = at.with_(keep=DropZeroVariance().keep)
            for aggregation in (SequenceMeanTokenMean(), SequenceSum()):
                objective = build(GroupMean(), SAMPLE, aggregation)
                longer = at.ascent(objective) / (1 - p**g - (1 - p) ** g)
                errors.append(far(mixed.ascent(objective), longer))
        return worst(errors)

    prove(
        "only groups with both right and wrong: the same direction, longer by 1/P(mixed)",
        "DAPO, section 3.2",
        error,
        Mutant(
            "groups with only right ones kept",
            "groups.filter.has_zero_variance",
            lambda f: lambda rewards_PG, valid_PG: (rewards_PG == 0).all(dim=1),
        ),
    )

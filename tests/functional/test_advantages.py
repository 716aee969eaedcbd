import itertools
import math

import pytest
import torch

from grpo_lightning.functional.advantages import (
    batch_centred,
    group_centred,
    group_normalized_advantages,
    has_zero_variance,
    leave_one_out_centred,
    length_weighted_centred,
    pass_at_k_advantages,
    per_reward_normalized,
    uncentred,
)

ALL = torch.ones(1, 4, dtype=torch.bool)
NAN = float("nan")


def fp64(values):
    return torch.tensor(values, dtype=torch.float64)


def close(got, want, atol=1e-14):  # a few operations on numbers of order one
    torch.testing.assert_close(got, fp64(want), rtol=0, atol=atol)


def test_by_hand_with_population_and_sample_deviation():
    # mean 1/4, population variance 3/16, sample variance 1/4
    rewards = fp64([[1.0, 0.0, 0.0, 0.0]])
    population = group_normalized_advantages(rewards, ALL, ddof=0, epsilon=0.0)
    sample = group_normalized_advantages(rewards, ALL, ddof=1, epsilon=0.0)
    root3 = 3**0.5
    close(population, [[root3, -1 / root3, -1 / root3, -1 / root3]])
    close(sample, [[1.5, -0.5, -0.5, -0.5]])


def test_baselines_by_hand():
    rewards, valid = fp64([[1.0, 0.0, 0.0, 3.0], [2.0, 2.0, 4.0, 4.0]]), torch.ones(2, 4, dtype=torch.bool)
    # group means 1 and 3
    close(group_centred(rewards, valid), [[0, -1, -1, 2], [-1, -1, 1, 1]])
    # the others' means: 3/3, 4/3, 4/3, 1/3 and 10/3, 10/3, 8/3, 8/3
    close(leave_one_out_centred(rewards, valid), [[0, -4 / 3, -4 / 3, 8 / 3], [-4 / 3, -4 / 3, 4 / 3, 4 / 3]])
    # the batch's mean 16/8
    close(batch_centred(rewards, valid), [[-1, -2, -2, 1], [0, 0, 2, 2]])
    # lengths 1 2 3 4: (1 + 12) / 10; lengths 4 3 2 1: (8 + 6 + 8 + 4) / 10
    lengths = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    close(
        length_weighted_centred(rewards, valid, lengths),
        [[1 - 1.3, -1.3, -1.3, 3 - 1.3], [2 - 2.6, 2 - 2.6, 4 - 2.6, 4 - 2.6]],
    )
    assert torch.equal(uncentred(rewards, valid), rewards)


def test_two_ways_to_one_total_differ_when_each_reward_is_normalised_by_itself():
    # Columns (1, 0, 0) and (0, 1, 3): totals 1, 1, 3.
    # Column 1: mean 1/3, population variance 2/9, so (2/3, -1/3, -1/3) / (sqrt(2)/3) = (sqrt(2), -sqrt(.5), -sqrt(.5)).
    # Column 2: mean 4/3, population variance 14/9, so (-4, -1, 5) / sqrt(14).
    values = fp64([[[1.0, 0.0], [0.0, 1.0], [0.0, 3.0]]])
    got = per_reward_normalized(values, ALL[:, :3], fp64([1.0, 0.5]), ddof=0, epsilon=0.0)
    root = math.sqrt(14)
    close(got, [[2**0.5 - 2 / root, -(0.5**0.5) - 0.5 / root, -(0.5**0.5) + 2.5 / root]])
    totals = group_normalized_advantages(values.sum(dim=2), ALL[:, :3], ddof=0, epsilon=0.0)
    assert totals[0, 0] == totals[0, 1]


def test_a_reward_that_does_not_apply_leaves_only_its_own_statistics():
    values = fp64([[[1.0, 5.0], [0.0, NAN], [0.0, 7.0]]])
    got = per_reward_normalized(values, ALL[:, :3], fp64([1.0, 1.0]), ddof=0, epsilon=0.0)
    # The second column is (5, 7): -1 and +1; the middle completion has the first column alone.
    close(got, [[2**0.5 - 1, -(0.5**0.5), -(0.5**0.5) + 1]])


@pytest.mark.parametrize(("num_correct", "k"), [(1, 1), (1, 2), (2, 2), (3, 2), (2, 3), (1, 4), (5, 4)])
def test_pass_at_k_is_the_average_over_all_groups_of_k(num_correct, k):
    """Against the definition: over every k-subset, its reward less the mean, averaged over those one is a member of."""
    correct = [i < num_correct for i in range(6)]
    groups = list(itertools.combinations(range(6), k))
    rewards = [float(any(correct[i] for i in group)) for group in groups]
    mean = sum(rewards) / len(rewards)
    deviation = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
    want = []
    for i in range(6):
        mine = [reward - mean for group, reward in zip(groups, rewards, strict=True) if i in group]
        want.append(sum(mine) / len(mine))
    got = pass_at_k_advantages(torch.tensor([correct]), torch.ones(1, 6, dtype=torch.bool), k=k)
    close(got.centred_PG, [want])
    close(got.deviation_P1, [[deviation]])
    assert got.centred_PG.sum().abs() < 1e-14


@pytest.mark.parametrize("num_correct", [0, 4])
def test_pass_at_k_has_nothing_to_say_of_a_group_without_a_difference(num_correct):
    correct = torch.arange(4)[None] < num_correct
    got = pass_at_k_advantages(correct, ALL, k=2)
    assert got.centred_PG.tolist() == [[0.0] * 4]
    assert got.deviation_P1.tolist() == [[0.0]]


def test_pass_at_k_of_fewer_than_k_valid_completions_is_zero():
    correct, valid = torch.tensor([[True, False, False, False]]), torch.tensor([[True, True, False, False]])
    assert pass_at_k_advantages(correct, valid, k=3).centred_PG.tolist() == [[0.0] * 4]
    close(pass_at_k_advantages(correct, valid, k=1).centred_PG, [[0.5, -0.5, 0, 0]])


CENTRED = {
    "group": group_centred,
    "leave one out": leave_one_out_centred,
    "lengths": lambda r, v: length_weighted_centred(r, v, torch.arange(1, r.numel() + 1).view_as(r)),
    "batch": batch_centred,
    "normalized": lambda r, v: group_normalized_advantages(r, v, ddof=1, epsilon=0.0),
}


@pytest.mark.parametrize("centre", CENTRED.values(), ids=CENTRED)
def test_equal_rewards_give_exactly_zero_whatever_the_rounding(centre):
    rewards = torch.full((1, 3), 0.1)  # 0.1 + 0.1 + 0.1 is not 3 * 0.1 in binary
    assert centre(rewards, ALL[:, :3]).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("centre", [c for name, c in CENTRED.items() if name != "lengths"])
def test_a_failed_completion_leaves_the_others_as_if_it_had_never_been_drawn(centre):
    with_failure = fp64([[1.0, NAN, 0.0, 0.5]])
    valid = torch.tensor([[True, False, True, True]])
    got = centre(with_failure, valid)
    alone = centre(with_failure[:, [0, 2, 3]], ALL[:, :3])
    assert got[0, 1] == 0
    torch.testing.assert_close(got[:, [0, 2, 3]], alone, rtol=0, atol=1e-15)


@pytest.mark.parametrize("centre", CENTRED.values(), ids=CENTRED)
def test_one_valid_completion_or_none_learns_nothing(centre):
    rewards = torch.tensor([[1.0, NAN], [NAN, NAN]])
    valid = torch.tensor([[True, False], [False, False]])
    assert centre(rewards, valid).tolist() == [[0, 0], [0, 0]]
    assert has_zero_variance(rewards, valid).tolist() == [True, True]


def test_sums_and_squares_over_a_group():
    rewards = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    valid = torch.ones_like(rewards, dtype=torch.bool)
    for ddof, squares in ((0, 6.0), (1, 5.0)):
        advantages = group_normalized_advantages(rewards, valid, ddof=ddof, epsilon=0.0)
        assert advantages.sum(dim=1).abs().max() < 1e-12  # rounding of six numbers of order one
        torch.testing.assert_close(advantages.square().sum(dim=1), torch.full((50,), squares).double())


@pytest.mark.parametrize("centre", [group_centred, leave_one_out_centred, CENTRED["lengths"], CENTRED["normalized"]])
def test_groups_do_not_touch_each_other(centre):
    rewards = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    valid = torch.ones_like(rewards, dtype=torch.bool)
    before = centre(rewards, valid)
    rewards[1] += 100.0
    assert torch.equal(before[0], centre(rewards, valid)[0])

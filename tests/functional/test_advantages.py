import torch

from grpo_lightning.functional.advantages import group_normalized_advantages, has_zero_variance

ALL = torch.ones(1, 4, dtype=torch.bool)


def test_by_hand_with_population_and_sample_deviation():
    # mean 1/4, population variance 3/16, sample variance 1/4
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    population = group_normalized_advantages(rewards, ALL, ddof=0, epsilon=0.0)
    sample = group_normalized_advantages(rewards, ALL, ddof=1, epsilon=0.0)
    root3 = 3**0.5
    torch.testing.assert_close(population, torch.tensor([[root3, -1 / root3, -1 / root3, -1 / root3]]).double())
    torch.testing.assert_close(sample, torch.tensor([[1.5, -0.5, -0.5, -0.5]]).double())


def test_equal_rewards_give_exactly_zero_whatever_the_rounding():
    rewards = torch.full((1, 3), 0.1)  # 0.1 + 0.1 + 0.1 is not 3 * 0.1 in binary
    assert group_normalized_advantages(rewards, ALL[:, :3], ddof=1, epsilon=0.0).tolist() == [[0.0, 0.0, 0.0]]


def test_a_failed_completion_leaves_the_others_as_if_it_had_never_been_drawn():
    with_failure = torch.tensor([[1.0, float("nan"), 0.0, 0.5]], dtype=torch.float64)
    valid = torch.tensor([[True, False, True, True]])
    got = group_normalized_advantages(with_failure, valid, ddof=1, epsilon=1e-6)
    alone = group_normalized_advantages(with_failure[:, [0, 2, 3]], ALL[:, :3], ddof=1, epsilon=1e-6)
    assert got[0, 1] == 0
    torch.testing.assert_close(got[:, [0, 2, 3]], alone, rtol=0, atol=1e-15)


def test_one_valid_completion_or_none_learns_nothing():
    rewards = torch.tensor([[1.0, float("nan")], [float("nan"), float("nan")]])
    valid = torch.tensor([[True, False], [False, False]])
    assert group_normalized_advantages(rewards, valid, ddof=1, epsilon=0.0).tolist() == [[0, 0], [0, 0]]
    assert has_zero_variance(rewards, valid).tolist() == [True, True]


def test_sums_and_squares_over_a_group():
    rewards = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    valid = torch.ones_like(rewards, dtype=torch.bool)
    for ddof, squares in ((0, 6.0), (1, 5.0)):
        advantages = group_normalized_advantages(rewards, valid, ddof=ddof, epsilon=0.0)
        assert advantages.sum(dim=1).abs().max() < 1e-12  # rounding of six numbers of order one
        torch.testing.assert_close(advantages.square().sum(dim=1), torch.full((50,), squares).double())


def test_groups_do_not_touch_each_other():
    rewards = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    valid = torch.ones_like(rewards, dtype=torch.bool)
    before = group_normalized_advantages(rewards, valid, ddof=1, epsilon=1e-6)
    rewards[1] += 100.0
    after = group_normalized_advantages(rewards, valid, ddof=1, epsilon=1e-6)
    assert torch.equal(before[0], after[0])

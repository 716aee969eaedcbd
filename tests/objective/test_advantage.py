import pytest
import torch
from objective_cases import NAN, scored

from grpo_lightning.objective import (
    BatchMean,
    GroupMean,
    LeaveOneOut,
    LengthWeightedMean,
    NoBaseline,
    PassAtK,
    PerReward,
    ProcessSupervision,
)
from grpo_lightning.types import ConfigurationError


def close(got, want):
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-14)


def test_each_comparison_by_hand():
    groups = scored([[1.0, 0.0, 0.0, NAN], [1.0, 1.0, 3.0, 3.0]], lengths=[[2, 1, 1, 9], [1, 1, 1, 1]])
    third = 1 / 3
    close(GroupMean()(groups), [[2 * third, -third, -third, 0], [-1, -1, 1, 1]])
    close(LeaveOneOut()(groups), [[1, -0.5, -0.5, 0], [-4 / 3, -4 / 3, 4 / 3, 4 / 3]])
    close(LengthWeightedMean()(groups), [[0.5, -0.5, -0.5, 0], [-1, -1, 1, 1]])
    close(BatchMean()(groups), [[-2 / 7, -9 / 7, -9 / 7, 0], [-2 / 7, -2 / 7, 12 / 7, 12 / 7]])
    close(NoBaseline()(groups), [[1, 0, 0, 0], [1, 1, 3, 3]])


def test_pass_at_k_of_totals_that_miss_the_threshold_by_rounding():
    # 0.1 + 0.2 + 0.7 is 0.9999999999999999; one of three is correct: R = 1 - 1/3, sigma = sqrt(2)/3
    groups = scored([[0.1 + 0.2 + 0.7, 0.0, 0.0]])
    sigma = 2**0.5 / 3
    close(PassAtK(k=2, threshold=1.0, epsilon=0.0)(groups), [[1 / 3 / sigma, -1 / 6 / sigma, -1 / 6 / sigma]])


def test_per_reward_uses_the_columns_and_their_weights():
    groups = scored([[1.0, 2.0]], values=[[[1.0, 0.0], [0.0, 2.0]]], weights=(1.0, 3.0))
    close(PerReward(ddof=0, epsilon=0.0)(groups), [[1 - 3, -1 + 3]])


def test_steps_are_normalised_over_the_group():
    scores = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 1.0, 1.0]]], dtype=torch.float64)
    is_step = torch.tensor([[[False, True, True], [False, True, True]]])
    a, b = 3**-0.5, -(3**0.5)
    close(ProcessSupervision(ddof=0, epsilon=0.0)(scores, is_step), [[[0, a, b], [0, a, a]]])


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: PassAtK(k=0, threshold=1.0, epsilon=0.0), "advantage.k"),
        (lambda: PassAtK(k=1, threshold=1.0, epsilon=-1.0), "advantage.epsilon"),
        (lambda: PerReward(ddof=2, epsilon=0.0), "advantage.ddof"),
        (lambda: ProcessSupervision(ddof=0, epsilon=-1.0), "advantage.epsilon"),
    ],
)
def test_a_setting_out_of_range_is_named(build, key):
    with pytest.raises(ConfigurationError, match=rf"model\.objective\.{key} must be"):
        build()

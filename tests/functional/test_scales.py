import pytest
import torch

from grpo_lightning.functional.scales import (
    Moments,
    batch_std,
    group_mean,
    group_std,
    moments_of_constants,
    pooled,
    scaled,
    signal_share,
)

NAN = float("nan")
REWARDS = torch.tensor([[1.0, 0.0, 0.0, NAN], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
VALID = torch.tensor([[True, True, True, False], [True, True, True, True]])


def test_deviations_by_hand():
    # Group 1: mean 1/3, squares 4/9 + 1/9 + 1/9 = 2/3. Group 2: none.
    assert group_std(REWARDS, VALID, ddof=0)[0, 0].item() == pytest.approx((2 / 9) ** 0.5, abs=1e-15)
    assert group_std(REWARDS, VALID, ddof=1)[0, 0].item() == pytest.approx((1 / 3) ** 0.5, abs=1e-15)
    assert group_std(REWARDS, VALID, ddof=1)[1, 0] == 0
    # Batch: 1 0 0 2 2 2 2, mean 9/7, squares 17 - 81/7 = 38/7
    assert batch_std(REWARDS, VALID, ddof=0).item() == pytest.approx((38 / 49) ** 0.5, abs=1e-15)
    assert batch_std(REWARDS, VALID, ddof=1).item() == pytest.approx((38 / 42) ** 0.5, abs=1e-15)


def test_means_and_shares_by_hand():
    torch.testing.assert_close(group_mean(REWARDS, VALID), torch.tensor([[1 / 3], [2.0]], dtype=torch.float64))
    # 7 valid completions, of which the 4 of the second group have no signal
    assert signal_share(REWARDS, VALID).item() == pytest.approx(3 / 7, abs=1e-15)
    assert signal_share(REWARDS[1:], VALID[1:]).item() == 0


def test_what_is_zero_stays_zero_even_over_zero():
    assert scaled(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 4.0])).tolist() == [0.0, 0.5]


@pytest.mark.parametrize("ddof", [0, 1])
def test_pooled_moments_are_those_of_all_values_together(ddof):
    values = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e3
    lengths = [5, 1, 3, 2, 4, 5]
    rows = [row[:n] for row, n in zip(values, lengths, strict=True)]
    moments = Moments(
        torch.tensor(lengths, dtype=torch.float64).view(2, 3),
        torch.stack([row.mean() for row in rows]).view(2, 3),
        torch.stack([(row - row.mean()).square().sum() for row in rows]).view(2, 3),
    )
    together = torch.cat(rows)
    got = pooled(moments, ddof=ddof)
    # At a mean of 1000 a sum of squares would keep 10 digits; this keeps 13.
    torch.testing.assert_close(got.mean, together.mean(), rtol=1e-15, atol=0)
    torch.testing.assert_close(got.std, together.std(correction=ddof), rtol=1e-12, atol=0)


def test_a_completion_without_values_is_left_out():
    counts, means = torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[1.0, NAN, 3.0]])
    got = pooled(Moments(counts, means, torch.zeros(1, 3)), ddof=0)
    assert (got.mean.item(), got.std.item()) == (2.0, 1.0)


def test_equal_values_have_no_deviation_whatever_the_rounding():
    values = torch.full((1, 3), 0.1, dtype=torch.float64)  # of which three are not 0.3 in binary
    got = pooled(moments_of_constants(values, torch.tensor([[1, 1, 1]])), ddof=0)
    assert got.mean == values[0, 0]
    assert got.std == 0


def test_constants_weigh_as_often_as_they_are_counted():
    got = pooled(moments_of_constants(torch.tensor([[0.0, 1.0]]), torch.tensor([[3, 1]])), ddof=0)
    assert got.mean.item() == 0.25
    assert got.std.item() == pytest.approx((3 / 16) ** 0.5)

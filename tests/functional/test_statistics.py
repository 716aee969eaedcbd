import math

import pytest
import torch

from grpo_lightning.functional.statistics import (
    deviation_near_one,
    drift,
    effective_sample_size,
    lowest_and_highest,
    over_tokens,
    quantiles,
)

MASK = torch.tensor([[True, True, False], [True, False, False]])


def mean(values):
    return over_tokens({"x": torch.tensor(values)}, MASK)["x"]


def test_only_loss_tokens_count():
    got = mean([[1.0, 2.0, math.nan], [4.0, math.nan, math.nan]])
    assert (got.sum.item(), got.count.item()) == (7.0, 3.0)
    assert got.sum.dtype == got.count.dtype == torch.float64


def test_booleans_give_a_share_and_a_completions_value_counts_for_each_token():
    assert mean([[True], [False]]).sum.item() == 2.0
    assert mean([[5.0], [1.0]]).sum.item() == 11.0


def test_sums_are_in_fp64():
    values = torch.tensor([[2.0**24, 1.0, 0.0], [0.0, 0.0, 0.0]])  # 2^24 + 1 is no number of fp32
    assert over_tokens({"x": values}, MASK)["x"].sum.item() == 2**24 + 1


def test_drift_is_the_divergence_from_the_old_policy():
    old, new = torch.tensor([[0.1, 0.7, 0.2], [0.3, 0.3, 0.4]], dtype=torch.float64).log()
    divergence = (old.exp() * (old - new)).sum()
    torch.testing.assert_close((old.exp() * drift(new, old)).sum(), divergence, rtol=0, atol=1e-12)
    small = torch.tensor([1e-3]).double()
    # rho - 1 - log rho = d^2/2 + d^3/6 + ...
    assert drift(small, small * 0).item() == pytest.approx(5e-7, rel=1e-3)


def test_effective_sample_size_by_hand():
    weights = torch.tensor([1.0, 1.0, 0.0, 2.0])
    # (1 + 1 + 2)^2 / (4 * 6)
    got = effective_sample_size(weights.mean().item(), weights.square().mean().item())
    assert got == pytest.approx(16 / 24)
    assert effective_sample_size(0.0, 0.0) == 0.0


def test_the_deviation_of_numbers_near_one_survives_rounding():
    # 1 - d and 1 + d: the mean is 1, E[(x - 1)^2] = d^2. E[x^2] - 1 would be 0 in fp64.
    assert deviation_near_one(1.0, 1e-18) == pytest.approx(1e-9)
    assert deviation_near_one(3.0, 5.0) == 1.0  # 2 and 4
    assert deviation_near_one(1.1, 0.1**2 - 1e-18) == 0.0


def test_statistics_of_one_call_have_one_precision():
    values = {"double": torch.full((2, 3), 0.1, dtype=torch.float64), "single": torch.ones(2, 1), "flag": MASK}
    got = {name: statistic.sum.item() for name, statistic in over_tokens(values, MASK).items()}
    assert got == {"double": pytest.approx(0.3, abs=1e-16), "single": 3.0, "flag": 3.0}
    assert over_tokens({}, MASK) == {}


def test_a_mask_of_completions_gives_the_mean_over_completions():
    got = over_tokens({"x": torch.tensor([[3.0], [7.0]])}, torch.tensor([[True], [False]]))["x"]
    assert (got.sum.item(), got.count.item()) == (3.0, 1.0)


def test_the_lowest_and_the_highest_are_of_loss_tokens():
    low, high = lowest_and_highest(torch.tensor([[1.0, 2.0, -9.0], [4.0, 9.0, math.nan]]), MASK)
    assert (low.item(), high.item()) == (1.0, 4.0)
    assert [x.item() for x in lowest_and_highest(torch.ones(2, 3), MASK & False)] == [math.inf, -math.inf]
    assert [x.item() for x in lowest_and_highest(torch.tensor([[0.5], [2.0]]), MASK)] == [0.5, 2.0]


def test_quantiles_are_interpolated():
    values = torch.tensor([30.0, 10.0, 40.0, 20.0, 50.0])
    # The places among five values are 4 q: 0.4, 2 and 3.8.
    assert quantiles(values, [0.1, 0.5, 0.95]) == pytest.approx([14.0, 30.0, 48.0])
    assert quantiles(values[:1], [0.1, 0.9]) == [30.0, 30.0]
    random = torch.rand(101, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = torch.tensor([0.05, 0.5, 0.77], dtype=torch.float64)
    assert quantiles(random, levels.tolist()) == pytest.approx(torch.quantile(random, levels).tolist(), abs=1e-15)

import math

import pytest
import torch

from grpo_lightning.functional.statistics import drift, effective_sample_size, over_tokens, standard_deviation

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


def test_deviation_from_moments():
    assert standard_deviation(2.0, 5.0) == 1.0
    assert standard_deviation(0.1, 0.1**2 - 1e-18) == 0.0

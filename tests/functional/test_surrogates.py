import math

import pytest
import torch

from grpo_lightning.functional.ratios import sequence_mean, sequence_sum
from grpo_lightning.functional.surrogates import (
    capped_importance_sampling,
    clipped,
    geometric_mean,
    is_clipped_high,
    is_clipped_low,
    log_likelihood,
    soft_adaptive,
    two_sided_clipped,
    variational_soft,
)

LOW, HIGH, DELTA = 0.2, 0.3, 4.0
ONE = torch.ones(1, 1, dtype=torch.bool)

# Each as a function of (log pi, log rho, A), both of which carry the gradient of log pi.
ALL = {
    "clipped": lambda p, r, a: clipped(r, a, clip_low=LOW, clip_high=HIGH),
    "two-sided": lambda p, r, a: two_sided_clipped(r, a, clip_low=LOW, clip_high=HIGH, delta=DELTA),
    "cispo": lambda p, r, a: capped_importance_sampling(r, p, a, ratio_cap=5.0),
    "sapo": lambda p, r, a: soft_adaptive(r, a, temperature_positive=1.0, temperature_negative=1.05),
    "gmpo": lambda p, r, a: geometric_mean(r, a, ONE, log_clip=0.4),
    "vespo": lambda p, r, a: variational_soft(r, p, a, powers=(2.0, 3.0), rates=(3.0, 2.0)),
    "reinforce": lambda p, r, a: log_likelihood(p, a),
}


def coefficient(name, ratio, advantage):
    """The gradient with respect to log pi, where pi_old makes the ratio what it is."""
    logprob = torch.tensor([[-1.5]], dtype=torch.float64, requires_grad=True)
    log_ratio = logprob - logprob.detach() + math.log(ratio)
    ALL[name](logprob, log_ratio, torch.tensor([[advantage]], dtype=torch.float64)).sum().backward()
    return logprob.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "wanted"),
    [  # rho A, or 0 where the clip holds it
        (0.5, +1.0, 0.5),
        (0.5, -1.0, 0.0),
        (0.8 - 1e-6, -1.0, 0.0),
        (0.8 + 1e-6, -1.0, -0.800001),
        (1.0, +1.0, 1.0),
        (1.0, -1.0, -1.0),
        (1.3 - 1e-6, +1.0, 1.299999),
        (1.3 + 1e-6, +1.0, 0.0),
        (2.0, +1.0, 0.0),
        (2.0, -1.0, -2.0),
        (10.0, -1.0, -10.0),
    ],
)
def test_gradient_coefficient_of_each_case_of_the_clip(ratio, advantage, wanted):
    assert coefficient("clipped", ratio, advantage) == pytest.approx(wanted, abs=1e-12)
    if not (ratio > DELTA and advantage < 0):
        assert coefficient("two-sided", ratio, advantage) == pytest.approx(wanted, abs=1e-12)
    log_ratio, advantages = torch.tensor([[ratio]]).double().log(), torch.tensor([[advantage]]).double()
    low = is_clipped_low(log_ratio, advantages, clip_low=LOW)
    high = is_clipped_high(log_ratio, advantages, clip_high=HIGH)
    assert bool(low | high) == (wanted == 0.0)


@pytest.mark.parametrize(("ratio", "wanted"), [(4.0 - 1e-6, -3.999999), (4.0 + 1e-6, 0.0), (10.0, 0.0)])
def test_the_second_side_ends_the_gradient_of_a_negative_advantage(ratio, wanted):
    assert coefficient("two-sided", ratio, -1.0) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(("ratio", "weight"), [(0.1, 0.1), (1.0, 1.0), (4.9, 4.9), (5.1, 5.0), (100.0, 5.0)])
@pytest.mark.parametrize("advantage", [-1.0, 2.0])
def test_a_capped_ratio_takes_no_gradient_away(ratio, weight, advantage):
    assert coefficient("cispo", ratio, advantage) == pytest.approx(weight * advantage, abs=1e-12)


@pytest.mark.parametrize(("advantage", "tau"), [(2.0, 1.0), (-1.0, 1.05)])
@pytest.mark.parametrize("ratio", [0.25, 1.0, 3.0])
def test_the_soft_gates_gradient_is_that_of_the_sigmoid(ratio, advantage, tau):
    p = 1 / (1 + math.exp(-tau * (ratio - 1)))
    assert coefficient("sapo", ratio, advantage) == pytest.approx(4 * p * (1 - p) * ratio * advantage, abs=1e-12)


@pytest.mark.parametrize(("ratio", "advantage"), [(0.5, 1.0), (2.0, 1.0), (0.5, -1.0), (2.0, -1.0)])
def test_the_variational_kernel_is_a_constant_of_the_update(ratio, advantage):
    power, rate = (2.0, 3.0) if advantage > 0 else (3.0, 2.0)
    phi = ratio**power * math.exp(rate * (1 - ratio))
    assert coefficient("vespo", ratio, advantage) == pytest.approx(phi * advantage, abs=1e-12)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("advantage", [-0.7, 1.3])
def test_on_policy_all_have_the_gradient_of_reinforce(name, advantage):
    assert coefficient(name, 1.0, advantage) == pytest.approx(advantage, abs=1e-12)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("log_ratio", [-500.0, -50.0, 50.0, 500.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_values_and_gradients_stay_finite_in_single_precision(name, log_ratio, advantage):
    p = torch.tensor([[-1.0]], requires_grad=True)
    value = ALL[name](p, p - p.detach() + log_ratio, torch.tensor([[advantage]]))
    value.sum().backward()
    assert value.isfinite().all()
    assert p.grad.isfinite().all()


def test_each_ratio_is_clipped_before_the_geometric_mean():
    log_ratios = torch.tensor([[0.1, 0.9, -0.9, 7.0]] * 2, dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False]] * 2)
    advantages = torch.tensor([[2.0], [-2.0]], dtype=torch.float64)
    got = geometric_mean(log_ratios, advantages, mask, log_clip=0.4)
    # A > 0 holds 0.9 down to 0.4: (0.1 + 0.4 - 0.9) / 3. A < 0 holds -0.9 up to -0.4: (0.1 + 0.9 - 0.4) / 3.
    want = torch.tensor([[2 * math.exp(-0.4 / 3)], [-2 * math.exp(0.6 / 3)]], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


def test_the_unclipped_geometric_mean_is_the_sequence_ratio():
    log_ratios = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(5) < torch.tensor([[5], [1], [3]])
    advantages = torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64)
    got = geometric_mean(log_ratios, advantages, mask, log_clip=math.inf)
    torch.testing.assert_close(got, sequence_mean(log_ratios, mask).exp() * advantages, rtol=0, atol=1e-14)


def test_no_value_of_the_padding_reaches_a_completion():
    log_ratios = torch.tensor([[0.5, 123.0]], dtype=torch.float64)
    mask, advantages = torch.tensor([[True, False]]), torch.tensor([[1.0]], dtype=torch.float64)
    assert geometric_mean(log_ratios, advantages, mask, log_clip=0.4).item() == pytest.approx(math.exp(0.4))
    assert sequence_sum(log_ratios, mask).item() == 0.5

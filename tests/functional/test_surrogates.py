import pytest
import torch

from grpo_lightning.functional.surrogates import clipped_surrogate

LOW, HIGH = 0.2, 0.3


@pytest.mark.parametrize(
    ("ratio", "advantage", "coefficient"),
    [  # the gradient of the surrogate with respect to log pi is rho A, or 0 where the clip holds it
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
def test_gradient_coefficient_of_each_case(ratio, advantage, coefficient):
    log_ratio = torch.tensor([[ratio]], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([[advantage]], dtype=torch.float64)
    surrogate = clipped_surrogate(log_ratio, advantages, clip_low=LOW, clip_high=HIGH)
    surrogate.values_BT.sum().backward()
    assert log_ratio.grad.item() == pytest.approx(coefficient, abs=1e-12)
    is_clipped = bool(surrogate.is_clipped_low_BT | surrogate.is_clipped_high_BT)
    assert is_clipped == (coefficient == 0.0)


@pytest.mark.parametrize("log_ratio", [-500.0, -50.0, 50.0, 500.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_values_and_gradients_stay_finite(log_ratio, advantage):
    x = torch.tensor([[log_ratio]], requires_grad=True)
    value = clipped_surrogate(x, torch.tensor([[advantage]]), clip_low=LOW, clip_high=HIGH).values_BT
    value.sum().backward()
    assert value.isfinite().all()
    assert x.grad.isfinite().all()

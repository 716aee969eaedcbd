import math

import pytest
import torch

from grpo_lightning.functional.ratios import (
    finite_exp,
    sequence_mean,
    sequence_sum,
    sequence_value_token_gradient,
)

LOG_RATIOS = torch.tensor([[0.2, -0.4, 99.0], [0.3, 99.0, 99.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_levels_by_hand():
    torch.testing.assert_close(sequence_sum(LOG_RATIOS, MASK), torch.tensor([[-0.2], [0.3]]).double())
    torch.testing.assert_close(sequence_mean(LOG_RATIOS, MASK), torch.tensor([[-0.1], [0.3]]).double())


def test_the_geometric_mean_is_shared_by_its_tokens():
    x = LOG_RATIOS.clone().requires_grad_()
    sequence_mean(x, MASK).exp()[0].sum().backward()
    share = math.exp(-0.1) / 2  # s_i / |o_i|
    torch.testing.assert_close(x.grad[0], torch.tensor([share, share, 0.0], dtype=torch.float64), rtol=0, atol=1e-15)


def test_the_value_is_the_completions_and_the_gradient_the_tokens():
    x = LOG_RATIOS.clone().requires_grad_()
    ratios = sequence_value_token_gradient(x, MASK).exp()
    assert ratios[0, :2].tolist() == pytest.approx([math.exp(-0.1)] * 2, abs=1e-15)
    ratios[0, 0].backward()
    assert x.grad[0].tolist() == pytest.approx([math.exp(-0.1), 0.0, 0.0], abs=1e-15)


def test_a_row_without_loss_tokens_has_ratio_one():
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    assert sequence_mean(LOG_RATIOS[:1], nothing).item() == 0
    assert sequence_sum(LOG_RATIOS[:1], nothing).item() == 0


@pytest.mark.parametrize("log_ratio", [-1e4, -50.0, 50.0, 1e4])
def test_the_square_of_a_ratio_is_finite_in_single_precision(log_ratio):
    x = torch.tensor(log_ratio, requires_grad=True)
    finite_exp(x).square().backward()
    assert finite_exp(x).square().isfinite()
    assert x.grad.isfinite()

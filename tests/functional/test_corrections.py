import pytest
import torch

from grpo_lightning.functional.corrections import masked_weights, truncated_weights

WEIGHTS = torch.tensor([0.3, 0.5, 1.0, 4.9, 5.1], dtype=torch.float64)


def test_truncation_holds_large_weights():
    got = truncated_weights(WEIGHTS.log(), upper=2.0)
    torch.testing.assert_close(got, torch.tensor([0.3, 0.5, 1.0, 2.0, 2.0]).double())


def test_a_mask_takes_what_is_out_of_bounds_and_keeps_the_rest_as_it_is():
    got = masked_weights(WEIGHTS.log(), WEIGHTS.log(), lower=0.4, upper=5.0)
    torch.testing.assert_close(got, torch.tensor([0.0, 0.5, 1.0, 4.9, 0.0]).double())


def test_a_gate_of_the_completion_keeps_the_tokens_weights():
    log_weights = torch.tensor([[0.1, -0.1], [0.3, 0.1]], dtype=torch.float64)
    gates = log_weights.mean(dim=1, keepdim=True)  # 1 and exp(0.2) = 1.22
    got = masked_weights(log_weights, gates, lower=0.9, upper=1.1)
    torch.testing.assert_close(got, torch.stack([log_weights[0].exp(), torch.zeros(2).double()]))


@pytest.mark.parametrize("log_weight", [-3.0, 0.0, 3.0])
def test_without_bounds_both_are_importance_sampling(log_weight):
    x = torch.tensor(log_weight, dtype=torch.float64)
    assert truncated_weights(x, upper=float("inf")) == x.exp()
    assert masked_weights(x, x, lower=0.0, upper=float("inf")) == x.exp()


def test_no_gradient_flows_through_a_weight():
    x = torch.zeros(3, requires_grad=True)
    assert not truncated_weights(x, upper=2.0).requires_grad
    assert not masked_weights(x, x, lower=0.0, upper=2.0).requires_grad

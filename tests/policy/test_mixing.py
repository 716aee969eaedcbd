"""A reference follows the policy, weight by weight."""

import torch
from torch import nn

from grpo_lightning.policy import mix


def layer(*values):
    module = nn.Linear(2, 1, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([values[:2]]))
        module.bias.copy_(torch.tensor(values[2:]))
    return module


def test_the_share_is_the_policys():
    # 3/4 * (4, 0, 1) + 1/4 * (0, 8, 1) = (3, 2, 1), without a rounding
    reference, policy = layer(0.0, 8.0, 1.0), layer(4.0, 0.0, 1.0)
    mix(reference.parameters(), policy.parameters(), share=0.75)
    assert reference.weight.tolist() == [[3.0, 2.0]]
    assert reference.bias.tolist() == [1.0]
    assert policy.weight.tolist() == [[4.0, 0.0]]


def test_the_whole_share_is_a_copy_to_the_bit_also_of_what_is_not_finite():
    reference, policy = layer(float("inf"), float("nan"), 1.0), layer(0.1, 0.2, 0.3)
    mix(reference.parameters(), policy.parameters(), share=1.0)
    assert all(map(torch.equal, reference.parameters(), policy.parameters()))
    assert reference.weight.data_ptr() != policy.weight.data_ptr()


def test_no_gradient_is_asked_of_the_policy():
    reference, policy = layer(0.0, 8.0, 1.0).requires_grad_(False), layer(4.0, 0.0, 1.0)
    mix(reference.parameters(), policy.parameters(), share=0.5)
    assert not reference.weight.requires_grad
    assert reference.weight.grad_fn is None

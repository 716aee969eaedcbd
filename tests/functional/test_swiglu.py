import math

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import silu

from grpo_lightning.functional.swiglu import swiglu

SHAPE = (2, 9, 22)
PRECISIONS = [torch.float64, torch.float32, torch.bfloat16]


def inputs(dtype=torch.float64, shape=SHAPE):
    """The gate, what it is multiplied with, and the gradient of the product."""
    generator = torch.Generator().manual_seed(0)
    gate, up, grad = (4 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return gate.to(dtype).requires_grad_(), up.to(dtype).requires_grad_(), grad.to(dtype)


def test_values_by_hand():
    # The sigmoid of ln 3 is 3/4.
    gate = torch.tensor([0.0, math.log(3)])
    assert swiglu(gate, torch.tensor([5.0, 4.0])).tolist() == [0.0, pytest.approx(3 * math.log(3))]


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_values_and_gradients_are_those_of_the_plain_product_to_the_bit(dtype):
    gate, up, grad = inputs(dtype)
    plain, found = silu(gate) * up, swiglu(gate, up)
    assert torch.equal(found, plain)
    for one, other in zip(*(torch.autograd.grad(y, (gate, up), grad) for y in (found, plain)), strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other)
    with torch.no_grad():
        assert torch.equal(swiglu(gate, up), plain)


def test_gradients_are_those_of_finite_differences():
    gate, up, _ = inputs(shape=(3, 5))
    assert torch.autograd.gradcheck(swiglu, (gate, up))


@pytest.mark.parametrize("shape", [(7,), (0, 7)])
def test_a_single_row_and_none(shape):
    gate, up, grad = inputs(shape=shape)
    ours, plain = (torch.autograd.grad(y, (gate, up), grad) for y in (swiglu(gate, up), silu(gate) * up))
    assert all(map(torch.equal, ours, plain))


def test_a_gradient_whose_rows_are_apart_in_memory():
    gate, up, grad = inputs()
    apart = grad.transpose(0, 1).contiguous().transpose(0, 1)
    ours, plain = (torch.autograd.grad(y, (gate, up), apart) for y in (swiglu(gate, up), silu(gate) * up))
    torch.testing.assert_close(ours, plain, rtol=1e-14, atol=0)  # an exponential is rounded otherwise out of order


def test_factors_of_two_precisions_are_multiplied_in_the_higher_one():
    gate, up, _ = inputs(torch.float32)
    found = swiglu(gate.bfloat16(), up)
    assert found.dtype == torch.float32
    assert torch.equal(found, silu(gate.bfloat16()) * up)


def test_nothing_that_is_given_is_written_over():
    gate, up, grad = inputs()
    before = [tensor.detach().clone() for tensor in (gate, up, grad)]
    y = swiglu(gate, up)
    first, second = (torch.autograd.grad(y, (gate, up), grad, retain_graph=True) for _ in range(2))
    with torch.no_grad():
        swiglu(gate, up)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, (gate, up, grad), before))


def num_kept(product):
    gate, up, _ = inputs()
    storages = {}
    with saved_tensors_hooks(lambda t: storages.setdefault(t.untyped_storage()._cdata, t), lambda t: t):
        product(gate, up)
    return len(storages)


def test_the_activation_is_not_kept():
    assert num_kept(swiglu) == 2
    assert num_kept(lambda gate, up: silu(gate) * up) == 3

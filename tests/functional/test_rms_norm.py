import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from grpo_lightning.functional.rms_norm import rms_norm

N, D, EPS = 37, 48, 1e-5
SHAPES = {"[N, D]": (N, D), "[1, N, D]": (1, N, D), "[heads, N, D]": (3, N, D), "[D]": (D,)}
PRECISIONS = {
    # Of the input and the weight: everything in one; autocast, where the product is in single precision again.
    "fp32": (torch.float32, torch.float32),
    "fp64": (torch.float64, torch.float64),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "autocast": (torch.bfloat16, torch.float32),
}


def inputs(shape=(N, D), dtypes=PRECISIONS["fp32"]):
    """The input, the weight, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x = x * torch.logspace(-3, 1, x.numel() // D, dtype=torch.float64).view(*shape[:-1], 1)
    weight_D = 1 + 0.3 * torch.randn(D, generator=generator, dtype=torch.float64)
    return x.to(dtypes[0]).requires_grad_(), weight_D.to(dtypes[1]).requires_grad_(), grad


def module_of(weight_D):
    module = LlamaRMSNorm(D, eps=EPS)
    module.weight = torch.nn.Parameter(weight_D.detach().clone())
    return module


def gradients(y, x, weight_D, grad):
    return torch.autograd.grad(y, (x, weight_D), grad.to(y.dtype))


def in_double(x, weight_D):
    """The formula without a cast."""
    return weight_D * x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()


def relative(one, other):
    return float((one - other).norm() / other.norm())


def test_values_by_hand():
    # The mean square of 1 and 7 is 25, of which the root is 5.
    x, weight_D = torch.tensor([[1.0, 7.0]]), torch.tensor([10.0, -1.0])
    assert rms_norm(x, weight_D, eps=1e-12).tolist() == [[pytest.approx(2.0), pytest.approx(-1.4)]]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_those_of_transformers_to_the_bit(shape, precision):
    x, weight_D, _ = inputs(SHAPES[shape], PRECISIONS[precision])
    expected, found = module_of(weight_D)(x), rms_norm(x, weight_D, eps=EPS)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_values_without_a_gradient_are_the_same(precision):
    x, weight_D, _ = inputs(dtypes=PRECISIONS[precision])
    with torch.no_grad():
        found = rms_norm(x, weight_D, eps=EPS)
    expected = rms_norm(x, weight_D, eps=EPS)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_formula_in_double_precision(shape):
    x, weight_D, grad = inputs(SHAPES[shape])
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight_D)]
    expected = gradients(in_double(*exact), *exact, grad)
    for one, other in zip(gradients(rms_norm(x, weight_D, eps=EPS), x, weight_D, grad), expected, strict=True):
        assert relative(one, other) < 1e-6


# Rounded once at the end, ours is no farther from the formula than transformers', which rounds in between: 2^-9 here.
@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_gradients_in_half_precision_are_as_good_as_transformers(precision):
    x, weight_D, grad = inputs(dtypes=PRECISIONS[precision])
    grad = grad.to(torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight_D)]
    expected = gradients(in_double(*exact), *exact, grad)
    module = module_of(weight_D)
    theirs = gradients(module(x), x, module.weight, grad)
    ours = gradients(rms_norm(x, weight_D, eps=EPS), x, weight_D, grad)
    for one, other, truth in zip(ours, theirs, expected, strict=True):
        assert one.dtype == other.dtype
        assert relative(one, truth) <= 1.01 * relative(other, truth) < 0.01


def test_tensors_whose_rows_are_apart_in_memory():
    x, weight_D, grad = inputs((3, N, D))
    apart = [tensor.float().transpose(0, 1).contiguous().transpose(0, 1) for tensor in (x, grad)]
    found = gradients(rms_norm(apart[0], weight_D, eps=EPS), x, weight_D, apart[1])
    for one, other in zip(found, gradients(rms_norm(x, weight_D, eps=EPS), x, weight_D, grad), strict=True):
        assert relative(one, other) < 1e-6


def test_a_gradient_that_no_one_wants_is_not_made():
    x, weight_D, grad = inputs()
    both = gradients(rms_norm(x, weight_D, eps=EPS), x, weight_D, grad)
    (of_x,) = torch.autograd.grad(rms_norm(x, weight_D.detach(), eps=EPS), x, grad.float())
    (of_weight_D,) = torch.autograd.grad(rms_norm(x.detach(), weight_D, eps=EPS), weight_D, grad.float())
    assert torch.equal(of_x, both[0])
    assert torch.equal(of_weight_D, both[1])


def test_nothing_that_is_given_is_written_over():
    x, weight_D, grad = inputs()
    grad = grad.float()
    before = [tensor.detach().clone() for tensor in (x, weight_D, grad)]
    y = rms_norm(x, weight_D, eps=EPS)
    value = y.detach().clone()
    first, second = (torch.autograd.grad(y, (x, weight_D), grad, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert torch.equal(y, value)
    assert all(map(torch.equal, (x, weight_D, grad), before))


def kept_bytes(function, x):
    """What autograd keeps besides the input and the weight."""
    kept = {}
    with saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage()._cdata, t), lambda t: t):
        function(x)
    kept.pop(x.untyped_storage()._cdata, None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values() if tensor.shape != (D,))


@pytest.mark.parametrize(("precision", "copies"), [("fp32", 1), ("bf16", 3)])
def test_one_number_a_token_is_kept(precision, copies):
    """Transformers' module keeps the product with r, and where x is in half precision x in single precision too."""
    x, weight_D, _ = inputs(dtypes=PRECISIONS[precision])
    assert kept_bytes(lambda x: rms_norm(x, weight_D, eps=EPS), x) == 4 * N
    assert kept_bytes(module_of(weight_D), x) >= copies * x.element_size() * N * D

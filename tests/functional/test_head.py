import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_lightning.functional.head import Head, Tile, head_logprobs_and_entropy
from grpo_lightning.functional.logprobs import logprobs_and_entropy

N, D, V = 11, 6, 37
TILES = [(1, 1), (1, V), (N, 1), (3, 5), (4, 16), (N, V), (100, 100)]
VARIANTS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 0.7},
    "softcap_and_bias": {"softcap": 2.0, "bias": True},
    "temperature": {"temperature": 0.6, "bias": True},
    "softcap_and_temperature": {"softcap": 0.7, "temperature": 1.7},
    "entropy": {"entropy_gradient": True, "temperature": 0.6},
    "everything": {"entropy_gradient": True, "temperature": 1.7, "softcap": 0.7, "bias": True},
}


def inputs(dtype=torch.float64, *, num_tokens=N, vocabulary=V, bias=False):
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(num_tokens, D, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(vocabulary, D, generator=generator, dtype=torch.float64)
    bias_V = torch.randn(vocabulary, generator=generator, dtype=torch.float64) if bias else None
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in (hidden_ND, weight_VD, bias_V)]
    return leaves, torch.randint(vocabulary, (num_tokens,), generator=generator)


def values_and_gradients(dtype=torch.float64, *, tile, bias=False, softcap=None, full=False, **settings):
    settings = {"temperature": 1.0, **settings}
    (hidden_ND, weight_VD, bias_V), targets_N = inputs(dtype, bias=bias)
    head = Head(weight_VD, bias_V, softcap)
    if full:
        result = logprobs_and_entropy(head.logits(hidden_ND), targets_N, **settings)
    else:
        result = head_logprobs_and_entropy(hidden_ND, head, targets_N, tile=tile, **settings)
    weights_N = torch.linspace(-1, 2, N, dtype=result[0].dtype)
    loss = (result[0] * weights_N).sum()
    if settings.get("entropy_gradient"):
        loss = loss + (result[1] * weights_N.flip(0)).sum()
    loss.backward()
    return [*result, hidden_ND.grad, weight_VD.grad, *([bias_V.grad] if bias else [])]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_tiles_agree_with_the_softmax_over_the_whole_vocabulary(tile, variant):
    tiled = values_and_gradients(tile=Tile(*tile), **VARIANTS[variant])
    full = values_and_gradients(tile=None, full=True, **VARIANTS[variant])
    for one, other in zip(tiled, full, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)  # values of order one, in double precision


def test_in_single_precision_they_agree_to_its_rounding():
    tiled, full = (values_and_gradients(torch.float32, tile=Tile(3, 5), full=full) for full in (False, True))
    for one, other in zip(tiled, full, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=3e-6)  # sums of 37 numbers of order one


def test_values_by_hand():
    # exp(logits) = 1, 2, 5 of 8, in tiles of one token and two words.
    head = Head(torch.tensor([[1.0], [2.0], [5.0]], dtype=torch.float64).log())
    ones_ND = torch.ones(2, 1, dtype=torch.float64)
    logprobs_N, entropy_N = head_logprobs_and_entropy(
        ones_ND, head, torch.tensor([1, 2]), temperature=1.0, tile=Tile(1, 2)
    )
    assert logprobs_N.tolist() == pytest.approx([math.log(2 / 8), math.log(5 / 8)])
    assert entropy_N.tolist() == pytest.approx([math.log(8) - (2 * math.log(2) + 5 * math.log(5)) / 8] * 2)


def test_logits_far_apart_neither_overflow_nor_lose_the_others():
    head = Head(torch.tensor([[-1e4], [1e4], [1e4]]))
    logprobs_N, entropy_N = head_logprobs_and_entropy(
        torch.ones(2, 1), head, torch.tensor([1, 0]), temperature=1.0, tile=Tile(2, 1)
    )
    assert logprobs_N.tolist() == pytest.approx([-math.log(2), -2e4 - math.log(2)])
    assert entropy_N.tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize("tile", [None, Tile(3, 5)])
def test_half_precision_products_are_summed_in_single(tile):
    (hidden_ND, weight_VD, _), targets_N = inputs(torch.bfloat16)
    result = head_logprobs_and_entropy(hidden_ND, Head(weight_VD), targets_N, temperature=1.0, tile=tile)
    assert {values_N.dtype for values_N in result} == {torch.float32}
    result[0].sum().backward()
    assert hidden_ND.grad.dtype == weight_VD.grad.dtype == torch.bfloat16
    exact = logprobs_and_entropy((hidden_ND.double() @ weight_VD.double().T), targets_N, temperature=1.0)
    for one, other in zip(result, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=0.1)  # bfloat16 logits up to 8 are off by 2^-6


def test_autocast_makes_half_precision_products_in_the_backward_pass_too():
    def gradients(tile):
        (hidden_ND, weight_VD, _), targets_N = inputs(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            result = head_logprobs_and_entropy(hidden_ND, Head(weight_VD), targets_N, temperature=1.0, tile=tile)
        result[0].sum().backward()
        return *result, hidden_ND.grad, weight_VD.grad

    for one, other in zip(gradients(Tile(3, 5)), gradients(None), strict=True):
        assert one.dtype == other.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0, atol=0.1)


@pytest.mark.parametrize("tile", [None, Tile(3, 5)])
def test_the_entropy_is_a_statistic_unless_its_gradient_is_asked_for(tile):
    (hidden_ND, weight_VD, _), targets_N = inputs()
    _, entropy_N = head_logprobs_and_entropy(hidden_ND, Head(weight_VD), targets_N, temperature=1.0, tile=tile)
    assert not entropy_N.requires_grad


def test_frozen_weights_get_no_gradient():
    (hidden_ND, weight_VD, _), targets_N = inputs()
    weight_VD.requires_grad_(False)
    head_logprobs_and_entropy(hidden_ND, Head(weight_VD), targets_N, temperature=1.0, tile=Tile(3, 5))[
        0
    ].sum().backward()
    assert hidden_ND.grad is not None
    assert weight_VD.grad is None


class Largest(TorchDispatchMode):
    """The largest tensor that an operation makes, and what the backward pass keeps."""

    def __init__(self):
        super().__init__()
        self.made, self.kept = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_new = isinstance(out, torch.Tensor) and not any(
            isinstance(a, torch.Tensor) and a.untyped_storage()._cdata == out.untyped_storage()._cdata for a in args
        )
        self.made = max(self.made, out.numel() if is_new else 0)
        return out

    def keep(self, tensor):
        self.kept += tensor.numel()
        return tensor


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_memory_does_not_grow_with_the_vocabulary_but_for_the_weights(entropy_gradient):
    def measured(vocabulary):
        (hidden_ND, weight_VD, _), targets_N = inputs(num_tokens=64, vocabulary=vocabulary)
        counts = Largest()
        with counts, torch.autograd.graph.saved_tensors_hooks(counts.keep, lambda tensor: tensor):
            result = head_logprobs_and_entropy(
                hidden_ND,
                Head(weight_VD),
                targets_N,
                temperature=1.0,
                entropy_gradient=entropy_gradient,
                tile=Tile(16, 256),
            )
            (result[0].sum() + result[1].sum() * entropy_gradient).backward()
        return counts.made, counts.kept - weight_VD.numel()

    small, large = measured(1_000), measured(4_000)
    assert small == (1_000 * D, large[1])
    assert large[0] == 4_000 * D, "the weight's gradient; 64 rows of logits would be ten times as many"

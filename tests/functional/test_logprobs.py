import math

import pytest
import torch

from grpo_lightning.functional.logprobs import logprobs_and_entropy

# exp(logits) is 1, 2, 5 of 8 and 4, 4, 0 of 8.
LOGITS_NV = torch.tensor([[1.0, 2.0, 5.0], [4.0, 4.0, 0.0]], dtype=torch.float64).log()


def test_values_by_hand():
    logprobs_N, entropy_N = logprobs_and_entropy(LOGITS_NV[:1], torch.tensor([1]), temperature=1.0)
    # log(2/8); -(1/8 log 1/8 + 2/8 log 2/8 + 5/8 log 5/8) = log 8 - (2 log 2 + 5 log 5) / 8
    assert logprobs_N.tolist() == pytest.approx([math.log(2 / 8)])
    assert entropy_N.tolist() == pytest.approx([math.log(8) - (2 * math.log(2) + 5 * math.log(5)) / 8])


def test_the_temperature_divides_the_logits():
    # At temperature 1/2 the weights are squared: 1, 4, 25 of 30.
    logprobs_N, entropy_N = logprobs_and_entropy(LOGITS_NV[:1], torch.tensor([2]), temperature=0.5)
    assert logprobs_N.tolist() == pytest.approx([math.log(25 / 30)])
    assert entropy_N.tolist() == pytest.approx([-sum(w / 30 * math.log(w / 30) for w in (1, 4, 25))])


def test_each_position_has_its_own_target():
    logits_NV = torch.randn(40, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets_N = torch.arange(40) % 13
    logprobs_N, entropy_N = logprobs_and_entropy(logits_NV, targets_N, temperature=0.7)
    for row, target, logprob, entropy in zip(
        logits_NV.tolist(), targets_N.tolist(), logprobs_N, entropy_N, strict=True
    ):
        weights = [math.exp(z / 0.7) for z in row]
        shares = [w / sum(weights) for w in weights]
        assert float(logprob) == pytest.approx(math.log(shares[target]), abs=1e-12)
        assert float(entropy) == pytest.approx(-sum(p * math.log(p) for p in shares), abs=1e-12)


def test_uniform_logits_have_the_largest_entropy():
    _, entropy_N = logprobs_and_entropy(torch.zeros(2, 50), torch.zeros(2, dtype=torch.long), temperature=1.0)
    assert entropy_N.tolist() == pytest.approx([math.log(50)] * 2, rel=1e-6)  # fp32 knows 7 digits


def test_large_logits_neither_overflow_nor_lose_the_others():
    logprobs_N, entropy_N = logprobs_and_entropy(
        torch.tensor([[1e4, 1e4, -1e4]]).expand(2, -1), torch.tensor([0, 2]), temperature=1.0
    )
    assert logprobs_N.tolist() == pytest.approx([-math.log(2), -2e4 - math.log(2)])
    assert entropy_N.tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize(
    ("given", "computed"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2]
)
def test_it_is_computed_in_at_least_single_precision(given, computed):
    for values_N in logprobs_and_entropy(torch.zeros(1, 3, dtype=given), torch.tensor([0]), temperature=1.0):
        assert values_N.dtype == computed


def test_the_gradient_is_that_of_the_log_probability_and_none_of_the_entropy():
    logits_NV = LOGITS_NV[:1].clone().requires_grad_()
    logprobs_N, entropy_N = logprobs_and_entropy(logits_NV, torch.tensor([1]), temperature=2.0)
    assert not entropy_N.requires_grad
    logprobs_N.sum().backward()
    # d log pi(y) / d z = (1[v = y] - pi_v) / T, where pi are the roots 1, sqrt 2, sqrt 5 over their sum.
    roots = [1.0, 2**0.5, 5**0.5]
    expected = [((v == 1) - root / sum(roots)) / 2 for v, root in enumerate(roots)]
    assert logits_NV.grad[0].tolist() == pytest.approx(expected)


def test_the_entropy_is_a_statistic_unless_its_gradient_is_asked_for():
    logits_NV = LOGITS_NV[:1].clone().requires_grad_()
    assert not logprobs_and_entropy(logits_NV, torch.tensor([1]), temperature=1.0)[1].requires_grad
    _, entropy_N = logprobs_and_entropy(logits_NV, torch.tensor([1]), temperature=1.0, entropy_gradient=True)
    entropy_N.sum().backward()
    # dH/dz_v = -p_v (log p_v + H)
    p = torch.tensor([1 / 8, 2 / 8, 5 / 8], dtype=torch.float64)
    entropy = -(p * p.log()).sum()
    torch.testing.assert_close(logits_NV.grad[0], -p * (p.log() + entropy), rtol=0, atol=1e-14)
    with torch.no_grad():
        _, entropy_N = logprobs_and_entropy(logits_NV, torch.tensor([1]), temperature=1.0, entropy_gradient=True)
    assert not entropy_N.requires_grad

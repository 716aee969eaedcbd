import pytest
import torch

from grpo_lightning.functional.kl import importance_weighted, k1, k2, k3

LOGITS = torch.tensor([0.3, -1.0, 0.7, 0.1], dtype=torch.float64)
REFERENCE = torch.tensor([-0.2, 0.4, 0.0, 1.0], dtype=torch.float64).log_softmax(0)
OLD = torch.tensor([0.9, 0.2, -0.3, 0.0], dtype=torch.float64).log_softmax(0)


def gradient(function):
    logits = LOGITS.clone().requires_grad_()
    return torch.autograd.grad(function(logits.log_softmax(0)), logits)[0]


def forward_kl(logp):
    return (logp.exp() * (logp - REFERENCE)).sum()


def reverse_kl(logp):
    return (REFERENCE.exp() * (REFERENCE - logp)).sum()


def on_policy(estimator):
    """The expectation over samples of the policy, which are drawn, not differentiated."""
    return lambda logp: (logp.exp().detach() * estimator(logp, REFERENCE)).sum()


def close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_enumerated_expectations_are_the_divergence():
    logp = LOGITS.log_softmax(0)
    for estimator in (k1, k3):
        close(on_policy(estimator)(logp), forward_kl(logp))
    assert (on_policy(k2)(logp) - forward_kl(logp)).abs() > 1e-3


@pytest.mark.parametrize(
    ("estimator", "really"),
    [(k1, lambda logp: 0.0 * logp.sum()), (k2, forward_kl), (k3, reverse_kl)],
    ids=["k1: nothing", "k2: the divergence", "k3: the reverse divergence"],
)
def test_expected_gradient_as_a_loss(estimator, really):
    close(gradient(on_policy(estimator)), gradient(really))


@pytest.mark.parametrize("estimator", [k1, k3])
def test_off_policy_the_ratio_and_its_gradient_make_it_the_divergence(estimator):
    weighted = lambda logp: (OLD.exp() * importance_weighted(estimator(logp, REFERENCE), logp - OLD)).sum()  # noqa: E731
    close(weighted(LOGITS.log_softmax(0)), forward_kl(LOGITS.log_softmax(0)))
    close(gradient(weighted), gradient(forward_kl))
    unweighted = lambda logp: (OLD.exp() * estimator(logp, REFERENCE)).sum()  # noqa: E731
    assert (gradient(unweighted) - gradient(forward_kl)).abs().max() > 1e-3


def test_values_by_hand():
    # pi 1/2, pi_ref 1/4, so x = 1/2
    logp, reference = torch.tensor(0.5).double().log(), torch.tensor(0.25).double().log()
    log2 = torch.tensor(2.0).double().log()
    close(k1(logp, reference), log2)
    close(k2(logp, reference), log2**2 / 2)
    close(k3(logp, reference), 0.5 + log2 - 1)


def test_k3_is_never_negative_and_is_zero_at_the_reference():
    a, b = torch.randn(2, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (k3(a, b) >= 0).all()
    assert k3(a, a).abs().max() == 0


@pytest.mark.parametrize("estimator", [k1, k2, k3])
@pytest.mark.parametrize("difference", [-50.0, 50.0])
@pytest.mark.parametrize("log_ratio", [-50.0, 50.0])
def test_values_and_gradients_stay_finite_in_single_precision(estimator, difference, log_ratio):
    logp = torch.tensor(-1.0, requires_grad=True)
    value = importance_weighted(estimator(logp, logp.detach() - difference), logp - logp.detach() + log_ratio)
    value.backward()
    assert value.isfinite()
    assert logp.grad.isfinite()

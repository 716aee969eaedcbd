import torch

from grpo_lightning.functional.kl import k1, k3


def test_enumerated_expectations_are_the_divergence():
    logits = torch.tensor([0.3, -1.0, 0.7, 0.1], dtype=torch.float64)
    reference = torch.tensor([-0.2, 0.4, 0.0, 1.0], dtype=torch.float64).log_softmax(0)
    log_policy = logits.log_softmax(0)
    divergence = (log_policy.exp() * (log_policy - reference)).sum()
    for estimator in (k1, k3):
        expectation = (log_policy.exp() * estimator(log_policy, reference)).sum()
        torch.testing.assert_close(expectation, divergence, rtol=0, atol=1e-12)


def test_expected_gradient_of_k3_as_a_loss_is_that_of_the_reverse_divergence():
    logits = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.2, 0.4, 0.0], dtype=torch.float64).log_softmax(0)
    log_policy = logits.log_softmax(0)
    sampled = (log_policy.exp().detach() * k3(log_policy, reference)).sum()
    reverse = (reference.exp() * (reference - log_policy)).sum()
    got, want = (torch.autograd.grad(f, logits, retain_graph=True)[0] for f in (sampled, reverse))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_k3_is_never_negative_and_is_zero_at_the_reference():
    a, b = torch.randn(2, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (k3(a, b) >= 0).all()
    assert k3(a, a).abs().max() == 0

"""The loss of an update, put together from its parts."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from grpo_lightning.functional.kl import k3
from grpo_lightning.objective import (
    K1,
    K2,
    K3,
    Bypass,
    Cispo,
    Clipped,
    ConstantLength,
    EntropyBonus,
    GeometricRatio,
    GeometricTokenRatio,
    Gmpo,
    GroupMean,
    KLInLoss,
    KLInReturn,
    MaskedWeights,
    NoRatio,
    Objective,
    OffPolicySequences,
    ProductRatio,
    PromptMeanTokenMean,
    Reinforce,
    Sapo,
    SequenceMeanTokenMean,
    SequenceSum,
    Surrogate,
    TokenMean,
    TokenRatio,
    TopEntropyTokens,
    TruncatedCompletions,
    TruncatedWeights,
    TwoSidedClipped,
    Vespo,
    WeightedKLInLoss,
    grpo,
)
from grpo_lightning.types import Coefficients

CLIPPED = Clipped(clip_low=0.2, clip_high=0.28)
VESPO = Vespo(power_positive=2, rate_positive=3, power_negative=3, rate_negative=2)
TIS = TruncatedWeights(weight=TokenRatio(), upper=1.2)


def build(**parts):
    return Objective(
        **{
            "advantage": GroupMean(),
            "scale": None,
            "ratio": TokenRatio(),
            "surrogate": CLIPPED,
            "aggregation": TokenMean(),
            **parts,
        }
    )


EVERY = {
    "plain": build(),
    "two-sided": build(surrogate=TwoSidedClipped(clip_low=0.2, clip_high=0.2, delta=4.0)),
    "cispo, bypassed": build(surrogate=Cispo(ratio_cap=1.5), correction=Bypass(), aggregation=PromptMeanTokenMean()),
    "sapo": build(surrogate=Sapo(temperature_positive=1.0, temperature_negative=1.05)),
    "gmpo": build(surrogate=Gmpo(log_clip=0.4), aggregation=SequenceMeanTokenMean()),
    "vespo": build(surrogate=VESPO, ratio=ProductRatio()),
    "reinforce": build(surrogate=Reinforce(), ratio=NoRatio(), aggregation=SequenceSum()),
    "gspo": build(ratio=GeometricRatio(), aggregation=SequenceMeanTokenMean()),
    "gspo-token": build(ratio=GeometricTokenRatio(), aggregation=ConstantLength(length=7)),
    "tis": build(correction=TIS),
    "rejection": build(
        correction=MaskedWeights(weight=TokenRatio(), gate=GeometricRatio(), lower=0.9, upper=1.1),
        masks=(OffPolicySequences(max_drift=0.05),),
    ),
    "regularised": build(
        kl=WeightedKLInLoss(coefficient=0.1, estimator=K3()),
        entropy=EntropyBonus(coefficient=0.2),
        aggregation=PromptMeanTokenMean(),
    ),
    "deepseekmath": grpo(),
}
OF_COMPLETIONS = ("policy/kl_sequence", "policy/masked_completions", "policy/clip_fraction_sequence")


@pytest.mark.parametrize("objective", EVERY.values(), ids=EVERY)
def test_the_parts_of_any_partition_add_up(minibatch, objective):
    whole, gradient = minibatch.loss(objective), minibatch.gradient(objective)
    for cut in ([[0], [1], [2], [3]], [[0, 2], [1, 3]], [[3, 0, 1], [2]]):
        parts = [minibatch.loss(objective, rows=rows) for rows in cut]
        torch.testing.assert_close(sum(p.loss for p in parts), whole.loss, rtol=0, atol=1e-14)
        again = torch.autograd.grad(sum(p.loss for p in parts), minibatch.logprobs_BT)[0]
        torch.testing.assert_close(again, gradient, rtol=0, atol=1e-14)
        for name, statistic in whole.statistics.items():
            torch.testing.assert_close(sum(p.statistics[name].sum for p in parts), statistic.sum, rtol=0, atol=1e-13)
            assert sum(p.statistics[name].count for p in parts) == statistic.count
            assert statistic.count == (4 if name in OF_COMPLETIONS else 10)
        for name, part in whole.parts.items():
            torch.testing.assert_close(sum(p.parts[name] for p in parts), part, rtol=0, atol=1e-14)
        assert {name: min(p.lowest[name] for p in parts) for name in whole.lowest} == whole.lowest
        assert {name: max(p.highest[name] for p in parts) for name in whole.highest} == whole.highest


@pytest.mark.parametrize("objective", EVERY.values(), ids=EVERY)
def test_more_padding_changes_nothing(minibatch, objective):
    whole, gradient = minibatch.loss(objective), minibatch.gradient(objective)
    wider = replace(
        minibatch,
        logprobs_BT=torch.nn.functional.pad(minibatch.logprobs_BT.detach(), (0, 3)).requires_grad_(),
        batch=minibatch.batch._replace(
            **{
                name: torch.nn.functional.pad(part, (0, 3))
                for name, part in minibatch.batch._asdict().items()
                if part is not None and part.dim() == 2 and part.shape[1] > 1
            }
        ),
    )
    torch.testing.assert_close(wider.loss(objective).loss, whole.loss, rtol=0, atol=1e-14)
    got = wider.gradient(objective)
    torch.testing.assert_close(got[:, :4], gradient, rtol=0, atol=1e-14)
    assert got[:, 4:].abs().max() == 0
    assert gradient[~minibatch.batch.mask_BT].abs().max() == 0


@pytest.mark.parametrize("objective", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("shift", [-50.0, 50.0])
def test_loss_and_gradient_are_finite_however_far_the_policy_moved(minibatch, objective, shift):
    far = replace(
        minibatch,
        logprobs_BT=minibatch.logprobs_BT.detach().float().requires_grad_(),
        batch=minibatch.batch._replace(
            **{name: getattr(minibatch.batch, name) + shift for name in ("old_logprobs_BT", "reference_logprobs_BT")}
        ),
    )
    assert far.loss(objective).loss.isfinite()
    assert far.gradient(objective).isfinite().all()


@pytest.mark.parametrize("objective", EVERY.values(), ids=EVERY)
def test_on_policy_the_policy_gradient_is_that_of_reinforce(minibatch, objective):
    objective = replace(objective, kl=None, entropy=None, masks=())
    same = minibatch.logprobs_BT.detach()
    on_policy = replace(minibatch, batch=minibatch.batch._replace(old_logprobs_BT=None, sampler_logprobs_BT=same))
    reinforce = replace(objective, surrogate=Reinforce(), ratio=NoRatio(), correction=None)
    # Where a completion has one ratio, its gradient is spread over its tokens evenly, which is the same under a mean of
    # each completion by itself.
    if isinstance(objective.ratio, GeometricRatio) or isinstance(objective.surrogate, Gmpo):
        assert isinstance(objective.aggregation, SequenceMeanTokenMean)
    torch.testing.assert_close(on_policy.gradient(objective), on_policy.gradient(reinforce), rtol=0, atol=1e-14)


def test_the_loss_by_hand(minibatch):
    logprobs, batch = minibatch.logprobs_BT.detach(), minibatch.batch
    total = 0.0
    for i, length in enumerate((3, 1, 4, 2)):
        row = 0.0
        for t in range(length):
            ratio = (logprobs[i, t] - batch.old_logprobs_BT[i, t]).exp().item()
            a = batch.advantages_BT[i, 0].item()
            x = (batch.reference_logprobs_BT[i, t] - logprobs[i, t]).item()
            row += min(ratio * a, min(max(ratio, 0.8), 1.2) * a) - 0.04 * (math.exp(x) - x - 1)
        total += row / length
    assert minibatch.loss(grpo()).loss.item() == pytest.approx(-total / 4, abs=1e-14)


def test_coefficients_are_those_of_the_moment(minibatch):
    objective = build(kl=KLInLoss(coefficient=0.1, estimator=K3()), entropy=EntropyBonus(coefficient=0.2))
    assert objective.coefficients == Coefficients(kl=0.1, entropy=0.2)
    plain = minibatch.loss(build()).loss
    of = lambda kl, entropy: minibatch.loss(objective, coefficients=Coefficients(kl, entropy)).loss  # noqa: E731
    mask, batch = minibatch.batch.mask_BT, minibatch.batch
    kl = k3(minibatch.logprobs_BT, batch.reference_logprobs_BT)[mask].mean()
    entropy = -minibatch.logprobs_BT[mask].mean()  # what the case calls entropy
    torch.testing.assert_close(of(0.5, 0.0), plain + 0.5 * kl, rtol=0, atol=1e-14)
    torch.testing.assert_close(of(0.0, 0.3), plain - 0.3 * entropy, rtol=0, atol=1e-14)


def test_a_bypassed_correction_measures_against_the_sampler_and_weighs_nothing(minibatch):
    batch = minibatch.batch
    bypassed = minibatch.loss(build(correction=Bypass()))
    swapped = replace(minibatch, batch=batch._replace(old_logprobs_BT=batch.sampler_logprobs_BT)).loss(build())
    assert bypassed.loss == swapped.loss
    assert "sampler/correction" not in bypassed.statistics


def test_weights_multiply_and_no_gradient_flows_through_them(minibatch):
    batch = minibatch.batch
    sampler = batch.sampler_logprobs_BT.clone().requires_grad_()
    old = batch.old_logprobs_BT.clone().requires_grad_()
    loss = replace(minibatch, batch=batch._replace(old_logprobs_BT=old, sampler_logprobs_BT=sampler)).loss(
        build(surrogate=Cispo(ratio_cap=100.0), correction=TIS)
    )
    assert torch.autograd.grad(loss.loss, [old, sampler], allow_unused=True, retain_graph=True) == (None, None)
    weights = (batch.old_logprobs_BT - batch.sampler_logprobs_BT).exp().clamp(max=1.2)
    ratios = (minibatch.logprobs_BT.detach() - batch.old_logprobs_BT).exp()
    got = torch.autograd.grad(loss.loss, minibatch.logprobs_BT)[0]
    want = -(weights * ratios * batch.advantages_BT).masked_fill(~batch.mask_BT, 0.0) / 10
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


def test_a_mask_ends_the_policy_gradient_and_not_the_penalty(minibatch):
    mask = torch.zeros_like(minibatch.batch.mask_BT)
    masked = replace(minibatch, batch=minibatch.batch._replace(policy_mask_BT=mask))
    objective = build(kl=KLInLoss(coefficient=0.1, estimator=K2()))
    want = 0.1 * (minibatch.logprobs_BT - minibatch.batch.reference_logprobs_BT).detach() / 10
    want = want.masked_fill(~minibatch.batch.mask_BT, 0.0)
    torch.testing.assert_close(masked.gradient(objective), want, rtol=0, atol=1e-14)
    assert masked.loss(objective).statistics["policy/masked"].sum == 10


def test_what_it_needs_to_be_told():
    kl = {"kl": KLInLoss(coefficient=0.1, estimator=K3())}
    plain = build()
    assert not plain.needs_reference
    assert not plain.needs_tokens
    assert not plain.needs_entropy_gradient
    assert [plain.needs_old_logprobs(num_updates=n) for n in (1, 2)] == [False, True]
    assert build(**kl).needs_reference
    assert not build(kl=KLInLoss(coefficient=0.0, estimator=K3())).needs_reference
    bypassed = build(correction=Bypass())
    assert not bypassed.needs_old_logprobs(num_updates=4)
    returns = build(kl=KLInReturn(coefficient=0.1, estimator=K1()))
    assert returns.needs_tokens
    assert returns.needs_old_logprobs(num_updates=1)
    assert build(masks=(TopEntropyTokens(share=0.2),)).needs_old_logprobs(num_updates=1)
    assert build(entropy=EntropyBonus(coefficient=0.0)).needs_entropy_gradient


def test_only_a_mask_of_completions_leaves_completions_out():
    truncated = torch.tensor([True, False])
    assert build().keeps(truncated).tolist() == [True, True]
    assert build(masks=(TopEntropyTokens(share=0.2), TruncatedCompletions())).keeps(truncated).tolist() == [False, True]


EVERYTHING = build(
    correction=TruncatedWeights(weight=TokenRatio(), upper=0.8),
    kl=KLInLoss(coefficient=0.1, estimator=K2()),
    entropy=EntropyBonus(coefficient=0.2),
    masks=(OffPolicySequences(max_drift=0.05),),
    surrogate=TwoSidedClipped(clip_low=0.2, clip_high=0.28, delta=1.5),
)


def test_statistics_by_hand(minibatch):
    # So that the last completion, which is bad, has drifted by 0.06, and the other bad one has not.
    batch = minibatch.batch._replace(sampler_logprobs_BT=minibatch.batch.sampler_logprobs_BT + 0.25)
    minibatch, mask = replace(minibatch, batch=batch), batch.mask_BT
    statistics = minibatch.loss(EVERYTHING).statistics
    means = {name: (s.sum / s.count).item() for name, s in statistics.items()}
    logp = minibatch.logprobs_BT.detach()
    ratios = (logp - batch.old_logprobs_BT).exp()
    weights = (batch.old_logprobs_BT - batch.sampler_logprobs_BT).exp()
    low, high = (ratios < 0.8) & (batch.advantages_BT < 0), (ratios > 1.28) & (batch.advantages_BT > 0)
    log_x = batch.reference_logprobs_BT - logp
    drift_B = [(batch.sampler_logprobs_BT - logp)[i][mask[i]].mean() for i in range(4)]
    dropped = torch.tensor([[a < 0 and d > 0.05] for a, d in zip((1.0, -1.0, 0.5, -2.0), drift_B, strict=True)])
    want = {
        "policy/entropy": -logp,
        "policy/ratio": ratios,
        "policy/ratio_square": (ratios - 1) ** 2,
        "policy/kl_old": ratios - 1 - ratios.log(),
        "policy/clip_low": low,
        "policy/clip_high": high,
        "policy/clip_fraction": low | high,
        "policy/clip_delta": (ratios > 1.5) & (batch.advantages_BT < 0),
        "policy/masked": dropped.expand_as(mask),
        "policy/kl": log_x**2 / 2,
        "policy/kl_k1": -log_x,
        "policy/kl_k3": log_x.exp() - log_x - 1,
        "sampler/kl": -weights.log(),
        "sampler/kl_k3": weights - 1 - weights.log(),
        "sampler/logprob_difference": weights.log().abs(),
        "sampler/multiplicative_error": weights.log().abs().exp(),
        "sampler/weight": weights,
        "sampler/weight_square": (weights - 1) ** 2,
        "sampler/correction": weights.clamp(max=0.8),
        "sampler/correction_square": (weights.clamp(max=0.8) - 1) ** 2,
        "sampler/out_of_bounds": weights > 0.8,
    }
    clipped_B = [(low | high)[i][mask[i]].double().mean().item() for i in range(4)]
    assert means == {
        **{name: pytest.approx(values[mask].double().mean().item()) for name, values in want.items()},
        "policy/kl_sequence": pytest.approx(-sum(log_x[mask]).item() / 4),  # summed in a completion, averaged over four
        "policy/masked_completions": dropped.double().mean().item(),
        "policy/clip_fraction_sequence": pytest.approx(sum(clipped_B) / 4),
    }
    assert means["policy/masked_completions"] == 1 / 4
    assert min(means["sampler/out_of_bounds"], means["policy/clip_delta"]) > 0


def test_the_least_and_the_greatest_by_hand(minibatch):
    batch, mask = minibatch.batch, minibatch.batch.mask_BT
    output = minibatch.loss(EVERYTHING)
    ratios = (minibatch.logprobs_BT.detach() - batch.old_logprobs_BT).exp()
    differences = (batch.old_logprobs_BT - batch.sampler_logprobs_BT).abs()
    clipped = ((ratios < 0.8) & (batch.advantages_BT < 0)) | ((ratios > 1.28) & (batch.advantages_BT > 0))
    shares = [clipped[i][mask[i]].double().mean() for i in range(4)]
    for bound, found in ((min, output.lowest), (max, output.highest)):
        assert {name: value.item() for name, value in found.items()} == {
            f"policy/ratio_{bound.__name__}": bound(ratios[mask]).item(),
            f"sampler/logprob_difference_{bound.__name__}": bound(differences[mask]).item(),
            f"policy/clip_fraction_sequence_{bound.__name__}": bound(shares).item(),
        }


def test_the_parts_of_the_loss_are_those_of_its_terms(minibatch):
    output = minibatch.loss(EVERYTHING)
    batch, mask, logp = minibatch.batch, minibatch.batch.mask_BT, minibatch.logprobs_BT.detach()
    parts = {name: part.item() for name, part in output.parts.items()}
    assert parts["train/kl_loss"] == pytest.approx(0.1 * ((logp - batch.reference_logprobs_BT)[mask] ** 2 / 2).mean())
    assert parts["train/entropy_loss"] == pytest.approx(0.2 * logp[mask].mean())  # minus the bonus on H = -logp here
    terms = [parts[f"train/{name}_loss"] for name in ("policy", "kl", "entropy")]
    assert parts["train/loss"] == pytest.approx(output.loss.item()) == pytest.approx(sum(terms))
    assert set(minibatch.loss(build()).parts) == {"train/loss", "train/policy_loss"}


def test_nothing_is_said_of_a_ratio_that_cannot_differ_from_one(minibatch):
    only = replace(minibatch, batch=minibatch.batch._replace(old_logprobs_BT=None, sampler_logprobs_BT=None))
    assert set(only.loss(build()).statistics) == {"policy/entropy"}
    assert not only.loss(build()).lowest


def test_the_mismatch_with_the_sampler_is_measured_whatever_the_objective(minibatch):
    only = replace(minibatch, batch=minibatch.batch._replace(old_logprobs_BT=None))
    difference = (minibatch.logprobs_BT.detach() - minibatch.batch.sampler_logprobs_BT)[minibatch.batch.mask_BT]
    found = only.loss(build()).statistics["sampler/kl"]
    assert (found.sum / found.count).item() == pytest.approx(-difference.mean().item())


@dataclass(frozen=True, kw_only=True)
class Hinge(Surrogate):
    """A surrogate from outside of the package."""

    margin: float

    def __call__(self, log_ratios_BT, logprobs_BT, advantages_BT, mask_BT):
        return -(self.margin - advantages_BT * log_ratios_BT).clamp(min=0)

    def statistics(self, log_ratios_BT, advantages_BT):
        return {"policy/hinge": advantages_BT * log_ratios_BT < self.margin}


def test_a_part_of_ones_own_is_a_class_and_nothing_else(minibatch):
    output = minibatch.loss(build(surrogate=Hinge(margin=0.5)))
    assert output.loss.isfinite()
    assert "policy/hinge" in output.statistics

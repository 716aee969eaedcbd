"""A sampler that is not the trainer's policy: what each weight makes up for, and that none is differentiated."""

from dataclasses import replace
from math import exp, inf

import torch
from enumeration import GRADED, SEQUENCES, Expectation, far, shortfall, worst
from mutants import Mutant, keyword, not_detached, replaced
from objective_cases import ragged_minibatch

from grpo_lightning.functional.ratios import finite_exp
from grpo_lightning.objective import (
    Bypass,
    Clipped,
    GeometricRatio,
    LeaveOneOut,
    MaskedWeights,
    NoRatio,
    Objective,
    OffPolicySequences,
    ProductRatio,
    Reinforce,
    SequenceMeanTokenMean,
    SequenceSum,
    TokenRatio,
    TruncatedWeights,
)

POLICY, SAMPLER = SEQUENCES.policy(0), SEQUENCES.policy(1)
TRUNCATED, MASKED = "objective.correction.truncated_weights", "objective.correction.masked_weights"
UNCLIPPED = Clipped(clip_low=inf, clip_high=inf)
LENGTHS = (3, 1, 4, 2)


def build(correction=None, *, ratio=None, surrogate=None, aggregation=None, masks=()):
    return Objective(
        advantage=LeaveOneOut(),
        scale=None,
        ratio=ratio or NoRatio(),
        surrogate=surrogate or Reinforce(),
        aggregation=aggregation or SequenceSum(),
        correction=correction,
        masks=masks,
    )


def importance(level):
    return TruncatedWeights(weight=level, upper=inf)


def corrected(objective, sampler, **at):
    at = {"policy": POLICY, "rewards": GRADED, "group_size": 2, "sampler": sampler} | at
    return Expectation(**at).ascent(objective)


def test_the_weight_of_the_completion_makes_the_update_exact(prove):
    def error():
        want = SEQUENCES.gradient_of_mean(POLICY, GRADED)
        whole, mean = importance(ProductRatio()), SequenceMeanTokenMean()
        ratio = {"ratio": ProductRatio(), "surrogate": UNCLIPPED, "aggregation": mean}
        return worst(
            far(corrected(build(whole), SAMPLER), want),
            far(
                corrected(
                    build(MaskedWeights(weight=ProductRatio(), gate=ProductRatio(), lower=0, upper=inf)), SAMPLER
                ),
                want,
            ),
            # The same weight as ratio of the surrogate, from an old policy and, bypassing it, from the sampler.
            far(corrected(build(**ratio), None, old=SAMPLER), want),
            far(corrected(build(Bypass(), **ratio), SAMPLER), want),
            shortfall(far(corrected(build(), SAMPLER), want), 1e-3),
        )

    def inverted(weights):
        return lambda log_weights, **bounds: weights(-log_weights, **bounds)

    prove(
        "weighted by pi/mu of the completion, as weight or as ratio: the policy gradient, from any sampler",
        "Importance sampling; CISPO, GSPO and TIS without bounds",
        error,
        Mutant("mu/pi", TRUNCATED, inverted),
        keyword("truncated", TRUNCATED, upper=lambda _: 1.5),
        keyword("bounded", MASKED, upper=lambda _: 1.5),
        replaced(
            "corrected twice",
            "objective.ratio.sequence_sum",
            lambda values_BT, mask_BT: 2 * values_BT.masked_fill(~mask_BT, 0.0).sum(dim=1, keepdim=True),
        ),
    )


def test_weights_have_the_mean_one(prove):
    def error():
        logprobs, sampler = (SEQUENCES.scores(logits).logprobs_BT for logits in (POLICY, SAMPLER))
        chance_Y = SEQUENCES.probabilities(SAMPLER)
        whole_Y1 = importance(ProductRatio())(logprobs - sampler, SEQUENCES.mask_YT)
        first_Y1 = importance(TokenRatio())(logprobs - sampler, SEQUENCES.mask_YT)[:, :1]
        return worst(abs((chance_Y * weights_Y1[:, 0]).sum().item() - 1) for weights_Y1 in (whole_Y1, first_Y1))

    prove(
        "the weights of completions, and those of a token, have the mean 1 under the sampler",
        "Importance sampling",
        error,
        keyword("truncated", TRUNCATED, upper=lambda _: 1.5),
    )


def test_weights_of_tokens_are_exact_to_first_order_only(prove):
    def error():
        want = SEQUENCES.gradient_of_mean(POLICY, GRADED)
        objective = build(importance(TokenRatio()))
        biases = [far(corrected(objective, POLICY + step * (SAMPLER - POLICY)), want) for step in (0.0, 0.01, 0.02)]
        # Twice as far, twice the bias, up to a relative 2% of the next order.
        return worst(biases[0], shortfall(biases[1], 1e-6), shortfall(0.1, abs(biases[2] / biases[1] - 2)))

    prove(
        "weighted by tokens: exact where mu = pi, and a bias that grows linearly with their distance",
        "Yao et al. 2025, truncated importance sampling",
        error,
        Mutant("twice the weight", TRUNCATED, lambda f: lambda log_weights, **bounds: 2 * f(log_weights, **bounds)),
    )


def log_weights(minibatch):
    return (minibatch.batch.old_logprobs_BT - minibatch.batch.sampler_logprobs_BT).tolist()


def by_hand(minibatch, weight):
    """REINFORCE's gradient under the sum over tokens, each weighed by weight(row, position)."""
    want = torch.zeros(4, 4, dtype=torch.float64)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            want[row, t] = -weight(row, t) * minibatch.batch.advantages_BT[row].item() / 4
    return want


def test_bounds_act_where_they_are_set(prove):
    def error():
        minibatch = ragged_minibatch()
        logs = log_weights(minibatch)
        means = [sum(logs[row][:length]) / length for row, length in enumerate(LENGTHS)]
        totals = [sum(logs[row][:length]) for row, length in enumerate(LENGTHS)]
        token, whole, geometric = TokenRatio(), ProductRatio(), GeometricRatio()

        def masked(weight, gate, lower, upper):
            return MaskedWeights(weight=weight, gate=gate, lower=lower, upper=upper)

        def inside(log_gate, lower, upper):
            return lower <= exp(log_gate) <= upper

        cases = (
            (TruncatedWeights(weight=token, upper=1.2), lambda row, t: min(exp(logs[row][t]), 1.2)),
            (TruncatedWeights(weight=whole, upper=1.2), lambda row, t: min(exp(totals[row]), 1.2)),
            (TruncatedWeights(weight=geometric, upper=1.1), lambda row, t: min(exp(means[row]), 1.1)),
            (masked(token, token, 0.8, 1.2), lambda row, t: exp(logs[row][t]) * inside(logs[row][t], 0.8, 1.2)),
            (masked(whole, whole, 0.0, 1.2), lambda row, t: exp(totals[row]) * inside(totals[row], 0.0, 1.2)),
            (masked(token, geometric, 0.9, 1.1), lambda row, t: exp(logs[row][t]) * inside(means[row], 0.9, 1.1)),
            (masked(token, token, 0.0, inf), lambda row, t: exp(logs[row][t])),
            (TruncatedWeights(weight=token, upper=inf), lambda row, t: exp(logs[row][t])),
        )
        return worst(far(minibatch.gradient(build(part)), by_hand(minibatch, weight)) for part, weight in cases)

    prove(
        "truncated weights are min(w, C), masked ones exactly 0 outside of their bounds; without bounds both are w",
        "TIS; IcePop, section 3.1",
        error,
        replaced(
            "clamped, not masked",
            MASKED,
            lambda log_weights, log_gates, *, lower, upper: finite_exp(log_weights).clamp(lower, upper),
        ),
        replaced(
            "dropped, not truncated",
            TRUNCATED,
            lambda log_weights, *, upper: finite_exp(log_weights) * (finite_exp(log_weights) <= upper),
        ),
        Mutant(
            "gate and weight swapped",
            MASKED,
            lambda f: lambda log_weights, log_gates, **bounds: f(log_gates, log_weights, **bounds),
        ),
    )


def test_the_proximal_policy_may_be_the_sampler(prove):
    def error():
        minibatch = ragged_minibatch()
        clip = {"ratio": TokenRatio(), "surrogate": Clipped(clip_low=0.2, clip_high=0.2)}
        batch = minibatch.batch
        from_sampler = replace(minibatch, batch=batch._replace(old_logprobs_BT=batch.sampler_logprobs_BT))
        plain, decoupled, bypass = (build(part, **clip) for part in (None, importance(TokenRatio()), Bypass()))
        weights_BT = (batch.old_logprobs_BT - batch.sampler_logprobs_BT).exp()
        return worst(
            far(from_sampler.gradient(decoupled), from_sampler.gradient(plain)),
            far(minibatch.gradient(bypass), from_sampler.gradient(plain)),
            far(minibatch.gradient(decoupled), weights_BT * minibatch.gradient(plain)),
        )

    prove(
        "decoupled PPO: (pi_old/mu) times PPO's gradient; with pi_old = mu, as when bypassed, PPO's alone",
        "Batch size-invariance for policy optimization (arXiv 2110.00641)",
        error,
        Mutant("twice the weight", TRUNCATED, lambda f: lambda log_weights, **bounds: 2 * f(log_weights, **bounds)),
        replaced(
            "bypass with the old policy",
            "objective.objective.Objective._old_logprobs",
            lambda self, logprobs_BT, batch: batch.old_logprobs_BT,
        ),
    )


def test_bad_completions_that_were_left_behind_are_masked(prove):
    def error():
        minibatch = ragged_minibatch()
        shifted_BT = minibatch.batch.sampler_logprobs_BT + 0.8
        minibatch = replace(minibatch, batch=minibatch.batch._replace(sampler_logprobs_BT=shifted_BT))
        drifts = [
            (minibatch.batch.sampler_logprobs_BT - minibatch.logprobs_BT)[row, :length].mean().item()
            for row, length in enumerate(LENGTHS)
        ]
        advantages = minibatch.batch.advantages_BT[:, 0].tolist()
        bad = sorted(drift for drift, advantage in zip(drifts, advantages, strict=True) if advantage < 0)
        delta = sum(bad) / 2
        assert 0 < delta < bad[1], f"the case needs a bad completion on either side of the bound, has {drifts}"

        def kept(row, t):
            return not (advantages[row] < 0 and exp(-drifts[row]) < exp(-delta))

        none, some, all_ = (
            build(masks=masks)
            for masks in ((), (OffPolicySequences(max_drift=delta),), (OffPolicySequences(max_drift=inf),))
        )
        return worst(
            far(minibatch.gradient(some), by_hand(minibatch, kept)),
            far(minibatch.gradient(all_), minibatch.gradient(none)),
        )

    target = "objective.mask.near_policy_sequences"

    def both_signs(logprobs_BT, sampler_logprobs_BT, advantages_BT, mask_BT, *, max_drift):
        drift_BT = (sampler_logprobs_BT - logprobs_BT).masked_fill(~mask_BT, 0.0)
        return drift_BT.sum(dim=1, keepdim=True) / mask_BT.sum(dim=1, keepdim=True) <= max_drift

    def swapped(mask):
        return lambda logprobs_BT, sampler_logprobs_BT, *args, **kwargs: mask(
            sampler_logprobs_BT, logprobs_BT, *args, **kwargs
        )

    prove(
        "A < 0 and a geometric ratio pi/mu under exp(-delta): no gradient; delta infinite: no mask",
        "DeepSeek-V3.2, equation 9",
        error,
        replaced("good completions too", target, both_signs),
        Mutant("mu and pi swapped", target, swapped),
    )


def test_weights_are_not_differentiated(prove):
    def error():
        minibatch, errors = ragged_minibatch(), []
        for level in (TokenRatio(), GeometricRatio(), ProductRatio()):
            for correction in (
                importance(level),
                MaskedWeights(weight=level, gate=level, lower=0.5, upper=5.0),
            ):
                batch = minibatch.batch
                old, sampler = (
                    part.clone().requires_grad_() for part in (batch.old_logprobs_BT, batch.sampler_logprobs_BT)
                )
                at = replace(minibatch, batch=batch._replace(old_logprobs_BT=old, sampler_logprobs_BT=sampler))
                loss = at.loss(build(correction)).loss
                slopes = torch.autograd.grad(
                    loss, [minibatch.logprobs_BT, old, sampler], allow_unused=True, materialize_grads=True
                )
                errors += [slope.abs().max().item() for slope in slopes[1:]]
        return worst(errors)

    prove(
        "the loss has no gradient in the old policy or the sampler through the weights",
        "TIS; IcePop, section 3.1",
        error,
        not_detached("truncated weights without their stop-gradient", TRUNCATED),
        not_detached("masked weights without their stop-gradient", MASKED),
        tolerance=0.0,
    )

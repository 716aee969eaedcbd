"""Ratios and surrogates: which multiple of the gradient of its log-probability every token gets."""

from dataclasses import replace
from math import exp, inf

import torch
from enumeration import far, worst
from mutants import Mutant, keyword, not_detached, replaced, times, wrong_sign
from objective_cases import ragged_minibatch

from grpo_lightning.functional.ratios import finite_exp, sequence_sum
from grpo_lightning.objective import (
    Cispo,
    Clipped,
    ConstantLength,
    GeometricRatio,
    GeometricTokenRatio,
    Gmpo,
    GroupMean,
    NoRatio,
    Objective,
    ProductRatio,
    PromptMeanTokenMean,
    Reinforce,
    Sapo,
    SequenceMeanTokenMean,
    SequenceSum,
    TokenMean,
    TokenRatio,
    TwoSidedClipped,
    Vespo,
)
from grpo_lightning.types import LossBatch, MinibatchCounts, TokenScores

UNCLIPPED = Clipped(clip_low=inf, clip_high=inf)
AGGREGATIONS = (
    SequenceMeanTokenMean(),
    TokenMean(),
    PromptMeanTokenMean(),
    SequenceSum(),
    ConstantLength(length=7.0),
)
SURROGATES = (
    (TokenRatio(), Clipped(clip_low=0.2, clip_high=0.28)),
    (TokenRatio(), Clipped(clip_low=1e-3, clip_high=1e-3)),
    (TokenRatio(), TwoSidedClipped(clip_low=0.2, clip_high=0.2, delta=4.0)),
    (GeometricRatio(), Clipped(clip_low=3e-4, clip_high=4e-4)),
    (GeometricTokenRatio(), Clipped(clip_low=3e-4, clip_high=4e-4)),
    (TokenRatio(), Gmpo(log_clip=0.4)),
    (TokenRatio(), Sapo(temperature_positive=1.0, temperature_negative=1.05)),
    (TokenRatio(), Cispo(ratio_cap=5.0)),
    (TokenRatio(), Cispo(ratio_cap=1.0)),
    (ProductRatio(), Vespo(power_positive=2, rate_positive=3, power_negative=3, rate_negative=2)),
)


def build(ratio, surrogate, aggregation=None):
    return Objective(
        advantage=GroupMean(),
        scale=None,
        ratio=ratio,
        surrogate=surrogate,
        aggregation=aggregation or SequenceMeanTokenMean(),
    )


def test_on_policy_all_surrogates_have_one_gradient(prove):
    def error():
        minibatch, errors = ragged_minibatch(), []
        current = minibatch.batch._replace(old_logprobs_BT=minibatch.logprobs_BT.detach())
        for batch in (current, current._replace(old_logprobs_BT=None)):
            at = replace(minibatch, batch=batch)
            for aggregation in AGGREGATIONS:
                want = at.gradient(build(NoRatio(), Reinforce(), aggregation))
                errors += [far(at.gradient(build(*parts, aggregation)), want) for parts in SURROGATES]
        return worst(errors)

    prove(
        "on-policy, the gradient of every surrogate is REINFORCE's under the same aggregation",
        "PPO, CISPO, GSPO, GMPO, SAPO, VESPO at a ratio of 1",
        error,
        times(0.25, "slope of the gate not 1", "objective.surrogate.soft_adaptive"),
        not_detached("CISPO without its stop-gradient", "objective.surrogate.capped_importance_sampling"),
        not_detached("VESPO without its stop-gradient", "objective.surrogate.variational_soft"),
        replaced("GSPO without 1/|o|", "objective.ratio.sequence_mean", sequence_sum),
        replaced("GMPO without 1/|o|", "functional.surrogates.sequence_mean", sequence_sum),
        wrong_sign("objective.surrogate.log_likelihood"),
    )


LOW, HIGH, DELTA = 0.2, 0.28, 4.0
NEAR = 1e-6
RATIOS = (0.5, 1 - LOW - NEAR, 1 - LOW + NEAR, 1.0, 1 + HIGH - NEAR, 1 + HIGH + NEAR, 2.0, 4 - NEAR, 4 + NEAR, 10.0)


def coefficients(surrogate, advantage):
    """Of the gradient of log pi, one per ratio of the list: single tokens under a mean over tokens."""
    logprobs_BT = torch.full((len(RATIOS), 1), -0.7, dtype=torch.float64, requires_grad=True)
    batch = LossBatch(
        advantages_BT=torch.full((len(RATIOS), 1), advantage, dtype=torch.float64),
        mask_BT=torch.ones(len(RATIOS), 1, dtype=torch.bool),
        group_tokens_B=torch.ones(len(RATIOS), dtype=torch.long),
        old_logprobs_BT=-0.7 - torch.tensor(RATIOS, dtype=torch.float64).log()[:, None],
    )
    objective = build(TokenRatio(), surrogate, TokenMean())
    scores, counts = TokenScores(logprobs_BT, -logprobs_BT), MinibatchCounts(tokens=1, sequences=1, groups=1)
    loss = objective.loss(scores, batch, counts, objective.coefficients).loss
    return -torch.autograd.grad(loss, logprobs_BT)[0][:, 0]


def table(*kept, advantage):
    """The ratio times the advantage where a 1 stands, 0 elsewhere."""
    return torch.tensor(kept) * torch.tensor(RATIOS, dtype=torch.float64) * advantage


def optimistic(clipped):
    def mutated(log_ratios_BT, advantages_BT, **bounds):
        return -clipped(log_ratios_BT, -advantages_BT, **bounds)

    return mutated


def swapped_bounds(clipped):
    def mutated(log_ratios_BT, advantages_BT, *, clip_low, clip_high, **others):
        return clipped(log_ratios_BT, advantages_BT, clip_low=clip_high, clip_high=clip_low, **others)

    return mutated


def test_the_clip_ends_the_gradient_on_one_side_of_each_bound(prove):
    def error():
        surrogate = Clipped(clip_low=LOW, clip_high=HIGH)
        # ratio                 .5 .8- .8+ 1 1.28- 1.28+ 2 4- 4+ 10
        raised = table(1, 1, 1, 1, 1, 0, 0, 0, 0, 0, advantage=1.0)
        lowered = table(0, 0, 1, 1, 1, 1, 1, 1, 1, 1, advantage=-1.0)
        return worst(far(coefficients(surrogate, 1.0), raised), far(coefficients(surrogate, -1.0), lowered))

    prove(
        "clipped: 0 for A > 0 above 1 + eps_high and for A < 0 below 1 - eps_low, else ratio times A",
        "PPO, equation 7; DAPO, equation 10",
        error,
        Mutant("the larger of the two, not the smaller", "objective.surrogate.clipped", optimistic),
        Mutant("eps_low and eps_high swapped", "objective.surrogate.clipped", swapped_bounds),
        wrong_sign("objective.surrogate.clipped"),
    )


def test_the_second_bound_ends_the_gradient_of_bad_tokens(prove):
    def error():
        surrogate = TwoSidedClipped(clip_low=LOW, clip_high=HIGH, delta=DELTA)
        # ratio                 .5 .8- .8+ 1 1.28- 1.28+ 2 4- 4+ 10
        raised = table(1, 1, 1, 1, 1, 0, 0, 0, 0, 0, advantage=1.0)
        lowered = table(0, 0, 1, 1, 1, 1, 1, 1, 0, 0, advantage=-1.0)
        return worst(far(coefficients(surrogate, 1.0), raised), far(coefficients(surrogate, -1.0), lowered))

    prove(
        "clipped on two sides: besides, 0 for A < 0 above delta",
        "INTELLECT-2, section 3.4; dual clip, equation 5",
        error,
        keyword("1 + delta", "objective.surrogate.two_sided_clipped", delta=lambda delta: 1 + delta),
        Mutant("eps_low and eps_high swapped", "objective.surrogate.two_sided_clipped", swapped_bounds),
    )


def test_no_token_loses_its_gradient_under_cispo(prove):
    def error():
        capped = torch.tensor(RATIOS, dtype=torch.float64).clamp(max=5.0)
        minibatch = ragged_minibatch()
        infinite = minibatch.gradient(build(TokenRatio(), Cispo(ratio_cap=inf)))
        return worst(
            far(coefficients(Cispo(ratio_cap=5.0), 1.0), capped),
            far(coefficients(Cispo(ratio_cap=5.0), -1.0), -capped),
            far(infinite, minibatch.gradient(build(TokenRatio(), UNCLIPPED))),
        )

    target = "objective.surrogate.capped_importance_sampling"
    prove(
        "CISPO: min(ratio, cap) times A for every token; with no cap the gradient of the unclipped ratio",
        "MiniMax-M1, equations 4 and 5",
        error,
        not_detached("gradient through the ratio", target),
        keyword("1 + cap", target, ratio_cap=lambda cap: 1 + cap),
    )


def test_the_soft_gate_has_its_own_slope(prove):
    def error():
        ratios = torch.tensor(RATIOS, dtype=torch.float64)
        errors = []
        for advantage, tau in ((1.0, 1.0), (-1.0, 1.5)):
            p = 1 / (1 + torch.exp(-tau * (ratios - 1)))
            got = coefficients(Sapo(temperature_positive=1.0, temperature_negative=1.5), advantage)
            errors.append(far(got, 4 * p * (1 - p) * ratios * advantage))
        return worst(errors)

    prove(
        "SAPO: 4 p (1 - p) ratio A, p the sigmoid of tau (ratio - 1), tau by the sign of A",
        "SAPO, equations 5 and 6",
        error,
        keyword(
            "one temperature for both signs", "objective.surrogate.soft_adaptive", temperature_negative=lambda _: 1.0
        ),
    )


def test_the_ratio_of_a_completion_is_its_geometric_mean(prove):
    def error():
        minibatch, errors = ragged_minibatch(), []
        objective = build(GeometricRatio(), UNCLIPPED, SequenceSum())
        for row, length in enumerate((3, 1, 4, 2)):
            tokens = slice(0, length)
            log_ratios = (minibatch.logprobs_BT - minibatch.batch.old_logprobs_BT).detach()[row, tokens]
            ratio = exp(sum(log_ratios.tolist()) / length)
            advantage = minibatch.batch.advantages_BT[row].item()
            # The sum over |o| tokens of s A, over four completions; its slope is |o| (s / |o|) A / 4 for each token.
            rows = slice(row, row + 1)
            want = torch.zeros(4, dtype=torch.float64).masked_fill(minibatch.batch.mask_BT[row], -ratio * advantage / 4)
            errors += [
                abs(minibatch.loss(objective, rows=rows).loss.item() + length * ratio * advantage / 4),
                far(
                    torch.autograd.grad(minibatch.loss(objective, rows=rows).loss, minibatch.logprobs_BT)[0][row], want
                ),
            ]
        return worst(errors)

    def mean_of_all_positions(values_BT, mask_BT):
        return values_BT.masked_fill(~mask_BT, 0.0).mean(dim=1, keepdim=True)

    prove(
        "s = exp(mean of log-ratios over the loss tokens), and its slope in each log-probability is s/|o|",
        "GSPO, equation 7",
        error,
        replaced("padding counted", "objective.ratio.sequence_mean", mean_of_all_positions),
        replaced("no 1/|o|", "objective.ratio.sequence_mean", sequence_sum),
    )


def test_the_token_form_of_gspo_is_gspo(prove):
    def error():
        minibatch = ragged_minibatch()
        clip = Clipped(clip_low=0.1, clip_high=0.1)
        errors = []
        for aggregation in AGGREGATIONS:
            whole, token = (build(r, clip, aggregation) for r in (GeometricRatio(), GeometricTokenRatio()))
            errors += [
                far(minibatch.loss(whole).loss, minibatch.loss(token).loss),
                far(minibatch.gradient(whole), minibatch.gradient(token)),
            ]
        return worst(errors)

    def both_gradients(log_ratios_BT, mask_BT):
        means_B1 = log_ratios_BT.masked_fill(~mask_BT, 0.0).sum(dim=1, keepdim=True) / mask_BT.sum(dim=1, keepdim=True)
        return means_B1 + log_ratios_BT - log_ratios_BT.detach()

    prove(
        "GSPO-token with one advantage per completion: GSPO, in value and gradient",
        "GSPO, equation 14",
        error,
        replaced("the mean not detached", "objective.ratio.sequence_value_token_gradient", both_gradients),
        replaced("the ratio of the token alone", "objective.ratio.sequence_value_token_gradient", lambda r, mask_BT: r),
    )


def test_gmpo_clips_each_token_before_the_mean(prove):
    def error():
        minibatch = ragged_minibatch()
        wide, narrow = build(TokenRatio(), Gmpo(log_clip=50.0)), build(TokenRatio(), Gmpo(log_clip=0.1))
        gspo = build(GeometricRatio(), UNCLIPPED)
        log_ratios_BT = (minibatch.logprobs_BT - minibatch.batch.old_logprobs_BT).detach()
        value = 0.0
        for row, length in enumerate((3, 1, 4, 2)):
            advantage = minibatch.batch.advantages_BT[row].item()
            held = [min(x, 0.1) if advantage > 0 else max(x, -0.1) for x in log_ratios_BT[row, :length].tolist()]
            value += exp(sum(held) / length) * advantage / 4
        return worst(
            far(minibatch.gradient(wide), minibatch.gradient(gspo)),
            far(minibatch.loss(wide).loss, minibatch.loss(gspo).loss),
            abs(minibatch.loss(narrow).loss.item() + value),
        )

    def one_sided(log_ratios_BT, advantages_B1, mask_BT, *, log_clip):
        lengths_B1 = mask_BT.sum(dim=1, keepdim=True)
        held_BT = log_ratios_BT.clamp(max=log_clip).masked_fill(~mask_BT, 0.0)
        return finite_exp(held_BT.sum(dim=1, keepdim=True) / lengths_B1) * advantages_B1

    def clip_after(log_ratios_BT, advantages_B1, mask_BT, *, log_clip):
        lengths_B1 = mask_BT.sum(dim=1, keepdim=True)
        means_B1 = log_ratios_BT.masked_fill(~mask_BT, 0.0).sum(dim=1, keepdim=True) / lengths_B1
        signs_B1 = advantages_B1.sign()
        return finite_exp((signs_B1 * means_B1).clamp(max=log_clip) * signs_B1) * advantages_B1

    prove(
        "GMPO: exp(mean of the log-ratios, each clipped in the direction of A) A; unclipped it is GSPO",
        "GMPO, equation 4",
        error,
        replaced("the sign of A left out of the clip", "objective.surrogate.geometric_mean", one_sided),
        replaced("the clip after the mean", "objective.surrogate.geometric_mean", clip_after),
    )


def test_luspo_is_gspo_times_the_length(prove):
    def error():
        minibatch = ragged_minibatch()
        clip = Clipped(clip_low=0.1, clip_high=0.1)
        mean, total = (build(GeometricRatio(), clip, a) for a in (SequenceMeanTokenMean(), SequenceSum()))
        lengths_B1 = torch.tensor([[3.0], [1.0], [4.0], [2.0]], dtype=torch.float64)
        by_hand = sum(
            length * minibatch.loss(mean, rows=slice(row, row + 1)).loss for row, length in enumerate((3, 1, 4, 2))
        )
        return worst(
            far(minibatch.gradient(total), lengths_B1 * minibatch.gradient(mean)),
            far(minibatch.loss(total).loss, by_hand),
        )

    def per_token(values_BT, mask_BT, *, num_sequences):
        return values_BT.masked_fill(~mask_BT, 0.0).sum() / mask_BT.sum()

    prove(
        "the sum over tokens of GSPO's objective: |o| times GSPO",
        "LUSPO (arXiv 2602.05261)",
        error,
        replaced("a mean over tokens", "objective.aggregation.sequence_sum", per_token),
    )


def test_vespo_weighs_by_the_kernel_of_the_whole_ratio(prove):
    def error():
        minibatch = ragged_minibatch()
        objective = build(SURROGATES[-1][0], SURROGATES[-1][1], SequenceSum())
        batch = minibatch.batch
        want = torch.zeros(4, 4, dtype=torch.float64)
        for row, length in enumerate((3, 1, 4, 2)):
            advantage = batch.advantages_BT[row].item()
            ratio = exp(sum((minibatch.logprobs_BT - batch.old_logprobs_BT)[row, :length].tolist()))
            k, rate = (2, 3) if advantage >= 0 else (3, 2)
            want[row, :length] = -(ratio**k) * exp(rate * (1 - ratio)) * advantage / 4
        return far(minibatch.gradient(objective), want)

    target = "objective.surrogate.variational_soft"
    prove(
        "VESPO: W^k exp(lambda (1 - W)) A for every token, W the ratio of the whole completion",
        "VESPO, section 3",
        error,
        not_detached("gradient through the kernel", target),
        keyword("powers of the signs swapped", target, powers=lambda powers: powers[::-1]),
    )

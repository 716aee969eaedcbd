"""What must not enter a loss: padding, how a minibatch is split, over how many ranks, and in which epoch."""

from dataclasses import replace

import torch
from enumeration import SEQUENCES, far, shortfall, worst
from mutants import Mutant, replaced
from objective_cases import ragged_minibatch

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
    TokenMean,
    TokenRatio,
    TruncatedCompletions,
    TruncatedWeights,
    TwoSidedClipped,
    Vespo,
    WeightedKLInLoss,
)
from grpo_lightning.types import LossBatch, MinibatchCounts, TokenScores

AGGREGATIONS = (
    SequenceMeanTokenMean(),
    TokenMean(),
    PromptMeanTokenMean(),
    SequenceSum(),
    ConstantLength(length=7.0),
)
PARTS = (
    {"ratio": TokenRatio(), "surrogate": Clipped(clip_low=0.2, clip_high=0.28)},
    {"ratio": TokenRatio(), "surrogate": TwoSidedClipped(clip_low=0.2, clip_high=0.2, delta=4.0)},
    {"ratio": GeometricRatio(), "surrogate": Clipped(clip_low=0.1, clip_high=0.1)},
    {"ratio": GeometricTokenRatio(), "surrogate": Clipped(clip_low=0.1, clip_high=0.1)},
    {"ratio": TokenRatio(), "surrogate": Gmpo(log_clip=0.1)},
    {"ratio": TokenRatio(), "surrogate": Sapo(temperature_positive=1.0, temperature_negative=1.05)},
    {"ratio": TokenRatio(), "surrogate": Cispo(ratio_cap=1.2)},
    {
        "ratio": ProductRatio(),
        "surrogate": Vespo(power_positive=2, rate_positive=3, power_negative=3, rate_negative=2),
    },
    {"kl": KLInLoss(coefficient=0.1, estimator=K1()), "entropy": EntropyBonus(coefficient=0.01)},
    {"kl": KLInLoss(coefficient=0.1, estimator=K2())},
    {"kl": WeightedKLInLoss(coefficient=0.1, estimator=K3())},
    {"correction": TruncatedWeights(weight=ProductRatio(), upper=1.5)},
    {"correction": MaskedWeights(weight=TokenRatio(), gate=GeometricRatio(), lower=0.8, upper=1.25)},
    {"ratio": TokenRatio(), "surrogate": Clipped(clip_low=0.2, clip_high=0.2), "correction": Bypass()},
    {"masks": (OffPolicySequences(max_drift=0.1),)},
)


def build(aggregation, **parts):
    plain = {"ratio": NoRatio(), "surrogate": Reinforce()}
    return Objective(advantage=GroupMean(), scale=None, aggregation=aggregation, **{**plain, **parts})


OBJECTIVES = [build(aggregation, **parts) for aggregation in AGGREGATIONS for parts in PARTS]
PARTITIONS = (
    [[0], [1], [2], [3]],
    [[0, 2], [1, 3]],
    [[3], [1, 0, 2]],
)


def padded(values, *, left, right, filling):
    """More columns on either side; a value of the whole completion stays as it is."""
    if values is None or values.dim() == 1 or values.shape[1] == 1:
        return values
    return torch.nn.functional.pad(values, (left, right), value=filling)


def test_padding_does_not_enter(prove):
    def error():
        minibatch, errors = ragged_minibatch(), []
        garbage = minibatch.logprobs_BT.detach().masked_fill(~minibatch.batch.mask_BT, -3.7)
        for objective in OBJECTIVES:
            loss, slope = minibatch.loss(objective).loss, minibatch.gradient(objective)
            for left, right in ((0, 3), (2, 0), (1, 1)):
                at = {"left": left, "right": right, "filling": -5.0}
                batch = LossBatch(*(padded(part, **at) for part in minibatch.batch))
                mask_BT = padded(minibatch.batch.mask_BT.long(), left=left, right=right, filling=0).bool()
                logprobs_BT = padded(garbage, **at).requires_grad_()
                wider = replace(minibatch, logprobs_BT=logprobs_BT, batch=batch._replace(mask_BT=mask_BT))
                wider_slope = wider.gradient(objective)
                errors += [
                    far(wider.loss(objective).loss, loss),
                    far(wider_slope[:, left : left + 4], slope),
                    wider_slope[~mask_BT].abs().max().item(),
                ]
        return worst(errors)

    def all_positions(values_BT, mask_BT):
        return values_BT.mean(dim=1, keepdim=True)

    prove(
        "more padding, on either side and of any content: the same loss and gradient, and none at the padding",
        "every part, under every aggregation",
        error,
        replaced("padding in the mean of a completion", "objective.ratio.sequence_mean", all_positions),
        replaced(
            "padding in the sum of tokens",
            "objective.aggregation.token_mean",
            lambda values_BT, mask_BT, *, num_tokens: values_BT.sum() / num_tokens,
        ),
        tolerance=1e-12,
    )


def local_sequences(aggregate):
    def mutated(values_BT, mask_BT, *args, num_sequences):
        return aggregate(values_BT, mask_BT, *args, num_sequences=len(mask_BT))

    return mutated


def local_tokens(aggregate):
    def mutated(values_BT, mask_BT, *, num_tokens):
        return aggregate(values_BT, mask_BT, num_tokens=int(mask_BT.sum()))

    return mutated


def local_groups(aggregate):
    def mutated(values_BT, mask_BT, group_tokens_B, *, num_groups):
        return aggregate(values_BT, mask_BT, mask_BT.sum().expand(len(mask_BT)), num_groups=num_groups)

    return mutated


LOCAL = (
    Mutant(
        "denominator of the micro-batch: completions", "objective.aggregation.sequence_mean_token_mean", local_sequences
    ),
    Mutant("denominator of the micro-batch: sums", "objective.aggregation.sequence_sum", local_sequences),
    Mutant("denominator of the micro-batch: tokens", "objective.aggregation.token_mean", local_tokens),
    Mutant("denominator of the micro-batch: groups", "objective.aggregation.prompt_mean_token_mean", local_groups),
)


def test_the_split_into_micro_batches_does_not_enter(prove):
    def error():
        minibatch, errors = ragged_minibatch(), []
        for objective in OBJECTIVES:
            whole, slope = minibatch.loss(objective), minibatch.gradient(objective)
            for partition in PARTITIONS:
                parts = [minibatch.loss(objective, rows=torch.tensor(rows)) for rows in partition]
                total = sum(part.loss for part in parts)
                errors += [far(total, whole.loss), far(torch.autograd.grad(total, minibatch.logprobs_BT)[0], slope)]
                errors += [
                    far(sum(part.statistics[name].sum for part in parts), statistic.sum)
                    for name, statistic in whole.statistics.items()
                ]
        return worst(errors)

    prove(
        "any partition into micro-batches adds up to the same loss, gradient and statistics",
        "every part, under every aggregation",
        error,
        *LOCAL,
        tolerance=1e-12,
    )


def test_a_rank_without_tokens_adds_nothing(prove):
    def error():
        minibatch, errors = ragged_minibatch(), []
        for objective in OBJECTIVES:
            blank = replace(
                minibatch,
                batch=minibatch.batch._replace(
                    mask_BT=torch.zeros(4, 4, dtype=torch.bool), group_tokens_B=torch.ones(4, dtype=torch.long)
                ),
            )
            whole = minibatch.gradient(objective)
            # The gradients of W ranks are averaged: each takes W times its share.
            for shares in ([[0, 3], [1], [2], []], [[0, 1, 2, 3], []]):
                at = [(minibatch if rows else blank, rows or [0]) for rows in shares]
                losses = [part.loss(objective, rows=torch.tensor(rows)).loss * len(shares) for part, rows in at]
                slopes = [torch.autograd.grad(loss, minibatch.logprobs_BT)[0] for loss in losses]
                errors += [far(torch.stack(slopes).mean(dim=0), whole)]
                errors += [losses[-1].abs().item(), slopes[-1].abs().max().item()]
        return worst(errors)

    def without_care(values_BT, mask_BT, *, num_sequences):
        return (values_BT.masked_fill(~mask_BT, 0.0).sum(dim=1) / mask_BT.sum(dim=1)).sum() / num_sequences

    prove(
        "unequal ranks, one without a loss token: W times each share, averaged, is the gradient of one rank; no NaN",
        "every part, under every aggregation",
        error,
        *LOCAL,
        replaced("0/0 where there is no token", "objective.aggregation.sequence_mean_token_mean", without_care),
        tolerance=1e-12,
    )


def test_the_first_update_needs_no_old_policy(prove):
    def error():
        minibatch, errors = ragged_minibatch(), []
        for objective in OBJECTIVES:
            first = replace(minibatch, batch=minibatch.batch._replace(old_logprobs_BT=None))
            again = replace(
                minibatch, batch=minibatch.batch._replace(old_logprobs_BT=minibatch.logprobs_BT.detach().clone())
            )
            errors += [
                far(first.loss(objective).loss, again.loss(objective).loss),
                far(first.gradient(objective), again.gradient(objective)),
            ]
        return worst(errors)

    prove(
        "another epoch on unchanged weights: the loss and gradient of the first, which has no old policy",
        "DeepSeekMath, algorithm 1",
        error,
        replaced(
            "the old policy differentiated",
            "objective.objective.Objective._old_logprobs",
            lambda self, logprobs_BT, batch: logprobs_BT if batch.old_logprobs_BT is None else batch.old_logprobs_BT,
        ),
        tolerance=0.0,
    )


def test_the_measured_drift_is_the_divergence_of_the_step(prove):
    def error():
        old = SEQUENCES.policy(0)
        step = 0.02 * torch.sign(SEQUENCES.policy(1))
        now = SEQUENCES.scores(old + step)
        objective = build(TokenMean(), **PARTS[0])
        before, chance_Y = SEQUENCES.scores(old), SEQUENCES.probabilities(old)
        batch = LossBatch(
            advantages_BT=torch.ones(7, 1, dtype=torch.float64),
            mask_BT=SEQUENCES.mask_YT,
            group_tokens_B=SEQUENCES.mask_YT.sum(dim=1),
            old_logprobs_BT=before.logprobs_BT,
        )
        counts = MinibatchCounts(tokens=1, sequences=1, groups=1)
        drift, squares = 0.0, 0.0
        for row in range(7):
            part = LossBatch(*(None if values is None else values[row : row + 1] for values in batch))
            scores = TokenScores(*(values[row : row + 1] for values in now))
            drift += (
                chance_Y[row]
                * objective.loss(scores, part, counts, objective.coefficients).statistics["policy/kl_old"].sum
            )
            squares += chance_Y[row] * (now.logprobs_BT - before.logprobs_BT)[row].square().sum() / 2
        divergence = (chance_Y * (before.logprobs_BT - now.logprobs_BT).sum(dim=1)).sum()
        # The squares are the divergence to second order; the third is 5% of it for differences under 0.05.
        return worst(
            far(drift, divergence), shortfall(0.05, abs((drift / squares).item() - 1)), shortfall(drift.item(), 1e-6)
        )

    prove(
        "policy/kl_old, summed over tokens: KL(pi_old || pi) exactly, and half the mean squared difference",
        "Schulman 2020, Approximating KL Divergence",
        error,
        Mutant("old and new swapped", "objective.measures.drift", lambda f: lambda now, old: f(old, now)),
    )


def test_truncated_completions_leave_the_loss_and_its_denominators(prove):
    def error():
        objective = build(SequenceMeanTokenMean(), **PARTS[0], masks=(TruncatedCompletions(),))
        kept_B = objective.keeps(torch.tensor([False, True, False, False]))
        minibatch = ragged_minibatch()
        mask_BT = minibatch.batch.mask_BT & kept_B[:, None]
        filtered = replace(
            minibatch,
            batch=minibatch.batch._replace(mask_BT=mask_BT),
            counts=MinibatchCounts(tokens=int(mask_BT.sum()), sequences=int(kept_B.sum()), groups=2),
        )
        rows = torch.tensor([0, 2, 3])
        without = replace(filtered, counts=MinibatchCounts(tokens=9, sequences=3, groups=2))
        want = torch.autograd.grad(without.loss(objective, rows=rows).loss, minibatch.logprobs_BT)[0]
        got = filtered.gradient(objective)
        return worst(far(got, want), got[1].abs().max().item(), float(kept_B.tolist() != [True, False, True, True]))

    prove(
        "a truncated completion, filtered: no gradient, and not counted in any denominator",
        "DAPO, section 3.4, overlong filtering",
        error,
        replaced(
            "the truncated ones kept alone",
            "objective.mask.TruncatedCompletions.__call__",
            lambda self, is_truncated_B: is_truncated_B,
        ),
        tolerance=1e-12,
    )

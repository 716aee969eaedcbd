"""Penalties for leaving the reference: their values, and what their gradients really are."""

import torch
from enumeration import BANDIT, SEQUENCES, Expectation, far, gradient, shortfall, worst
from mutants import Mutant, replaced, wrong_sign

from grpo_lightning.functional.kl import k1, k2, k3
from grpo_lightning.objective import (
    K1,
    K2,
    K3,
    GroupMean,
    KLInLoss,
    KLInReturn,
    KLInReward,
    LeaveOneOut,
    NoBaseline,
    NoRatio,
    Objective,
    Reinforce,
    SequenceSum,
    WeightedKLInLoss,
)

BETA = 0.5
ONE, REFERENCE, OLD = BANDIT.policy(0), BANDIT.policy(1), BANDIT.policy(2)
LONG, LONG_REFERENCE, LONG_OLD = SEQUENCES.policy(0), SEQUENCES.policy(1), SEQUENCES.policy(2)


def build(kl, advantage=None):
    return Objective(
        advantage=advantage or GroupMean(),
        scale=None,
        ratio=NoRatio(),
        surrogate=Reinforce(),
        aggregation=SequenceSum(),
        kl=kl,
    )


def penalised(kl, space=BANDIT, advantage=None, **at):
    """The gradient of the penalty alone: of beta times what is penalised, descended."""
    at = {"policy": ONE, "reference": REFERENCE} | at
    rewards = torch.zeros(len(space.tokens_YT), dtype=torch.float64)
    return -Expectation(space=space, rewards=rewards, group_size=2, **at).ascent(build(kl, advantage)) / BETA


def on_sequences(kl, advantage=None, **at):
    return penalised(kl, SEQUENCES, advantage, policy=LONG, reference=LONG_REFERENCE, **at)


def divergence(space, logits, reference):
    """KL(pi || pi_ref) over whole completions."""
    probabilities = space.probabilities(logits)
    return (probabilities * (probabilities.log() - space.probabilities(reference).log())).sum()


def slope(space=BANDIT, logits=ONE, reference=REFERENCE):
    return gradient(lambda leaf: divergence(space, leaf, reference), logits)


def slope_of_the_other(logits=ONE, reference=REFERENCE):
    """Of KL(pi_ref || pi)."""
    return gradient(lambda leaf: divergence(BANDIT, reference, leaf), logits)


def slope_of_states(drawing):
    """sum_s d(s) grad KL(pi(.|s) || pi_ref(.|s)), with d the visits of a state under `drawing`, held constant."""
    start = torch.softmax(drawing[0], dim=0)
    visits_S1 = torch.stack([torch.ones((), dtype=torch.float64), start[1], start[2]])[:, None]

    def weighted(leaf):
        log_policy, log_reference = leaf.log_softmax(dim=1), LONG_REFERENCE.log_softmax(dim=1)
        return (visits_S1 * log_policy.exp() * (log_policy - log_reference)).sum()

    return gradient(weighted, LONG)


def test_the_expected_values_of_the_estimators(prove):
    def error():
        probabilities_Y = BANDIT.probabilities(ONE)
        logprobs_Y, reference_Y = probabilities_Y.log(), BANDIT.probabilities(REFERENCE).log()
        estimates = [kind()(logprobs_Y, reference_Y) for kind in (K1, K2, K3)]
        means = [(probabilities_Y * estimate).sum() for estimate in estimates]
        want = divergence(BANDIT, ONE, REFERENCE)
        return worst(
            far(means[0], want),
            far(means[2], want),
            shortfall(far(means[1], want), 1e-3),
            shortfall(estimates[2].min().item(), 0.0),
        )

    def swapped(estimator):
        return lambda logprobs, reference_logprobs: estimator(reference_logprobs, logprobs)

    prove(
        "k1 and k3 have the expectation KL(pi || pi_ref), k2 another; k3 is never negative",
        "Schulman 2020, Approximating KL Divergence",
        error,
        Mutant("k1: policy and reference swapped", "objective.regularizer.k1", swapped),
        Mutant("k3: policy and reference swapped", "objective.regularizer.k3", swapped),
    )


def test_k1_in_the_loss_penalises_nothing(prove):
    def error():
        return worst(
            far(part(KLInLoss(coefficient=BETA, estimator=K1())), torch.zeros(())) for part in (penalised, on_sequences)
        )

    prove(
        "k1 in the loss: an expected gradient of 0",
        "Liu et al. 2025 (arXiv 2510.01555)",
        error,
        replaced("k2 for k1", "objective.regularizer.k1", k2),
    )


def test_k2_in_the_loss_is_the_divergence(prove):
    def error():
        kl = KLInLoss(coefficient=BETA, estimator=K2())
        return worst(far(penalised(kl), slope()), far(on_sequences(kl), slope_of_states(LONG)))

    prove(
        "k2 in the loss: the gradient of KL(pi || pi_ref); over tokens, that of each state by its visits",
        "Liu et al. 2025 (arXiv 2510.01555)",
        error,
        replaced("k3 for k2", "objective.regularizer.k2", k3),
        wrong_sign("objective.regularizer.k2"),
    )


def test_k3_in_the_loss_is_the_other_divergence(prove):
    def error():
        got = penalised(KLInLoss(coefficient=BETA, estimator=K3()))
        return worst(far(got, slope_of_the_other()), shortfall(far(got, slope()), 1e-3))

    prove(
        "k3 in the loss: the gradient of KL(pi_ref || pi), not of KL(pi || pi_ref)",
        "DeepSeekMath, equation 4; Liu et al. 2025 (arXiv 2510.01555)",
        error,
        replaced("k2 for k3", "objective.regularizer.k3", k2),
        k3_of_a_constant_ratio(),
    )


def k3_of_a_constant_ratio():
    """Its gradient is then that of k1."""

    def wrap(estimator):
        def mutated(logprobs, reference_logprobs):
            log_x = reference_logprobs - logprobs
            return log_x.detach().exp() - log_x - 1

        return mutated

    return Mutant("the ratio in k3 detached", "objective.regularizer.k3", wrap)


def test_k1_in_the_reward_is_the_divergence_of_whole_completions(prove):
    def error():
        want = slope(SEQUENCES, LONG, LONG_REFERENCE)
        whole = KLInReward(coefficient=BETA, estimator=K1())
        to_go = KLInReturn(coefficient=BETA, estimator=K1())
        return worst(
            far(on_sequences(whole, NoBaseline()), want),
            far(on_sequences(whole, LeaveOneOut()), want),
            far(on_sequences(whole, GroupMean()), want / 2),
            far(on_sequences(to_go), want),
            far(penalised(to_go), slope()),
            shortfall(far(slope_of_states(LONG), want), 1e-3),
        )

    def of_the_token_alone(values_BT):
        return values_BT

    def before(values_BT):
        return values_BT.cumsum(dim=-1)

    prove(
        "k1 in the reward, of the completion or to go: the gradient of KL(pi || pi_ref) with its visits",
        "DeepSeekMath, equation 2; RLOO, equation 3",
        error,
        replaced("of the token alone", "objective.credit.suffix_sums", of_the_token_alone),
        replaced("of the tokens before", "objective.credit.suffix_sums", before),
        replaced("k3 for k1", "objective.regularizer.k1", k3),
        wrong_sign("objective.regularizer.KLInReward.of_completions"),
    )


def test_off_policy_the_weighted_penalty_is_the_divergence(prove):
    def error():
        weighted = [WeightedKLInLoss(coefficient=BETA, estimator=kind()) for kind in (K1, K3)]
        plain = [KLInLoss(coefficient=BETA, estimator=kind()) for kind in (K2, K3)]
        return worst(
            *(far(penalised(kl, old=OLD), slope()) for kl in weighted),
            *(far(on_sequences(kl, old=LONG_OLD), slope_of_states(LONG_OLD)) for kl in weighted),
            *(shortfall(far(penalised(kl, old=OLD), slope()), 1e-3) for kl in plain),
        )

    target = "objective.regularizer.importance_weighted"
    prove(
        "off-policy, ratio times k3 (or k1): the gradient of KL(pi || pi_ref); unweighted k2 and k3 are biased",
        "DeepSeek-V3.2, equation 7",
        error,
        Mutant("ratio detached", target, lambda f: lambda estimates, log_ratios: f(estimates, log_ratios.detach())),
        replaced("not weighted", target, lambda estimates, log_ratios: estimates),
        Mutant("ratio inverted", target, lambda f: lambda estimates, log_ratios: f(estimates, -log_ratios)),
    )


REWARDS = torch.tensor([1.0, 0.2, -0.4], dtype=torch.float64)


def update(logits, kl, advantage=None, **at):
    at = Expectation(space=BANDIT, policy=logits, rewards=REWARDS, group_size=2, reference=REFERENCE, **at)
    return at.ascent(build(kl, advantage or LeaveOneOut()))


def tilted():
    """Logits of pi_ref exp(R / beta) / Z."""
    return REFERENCE + REWARDS / BETA


def hyperbolic():
    """Logits of beta pi_ref / (lambda - R), with lambda such that it sums to 1, by bisection."""
    reference_Y = BANDIT.probabilities(REFERENCE)
    low, high = REWARDS.max().item(), REWARDS.max().item() + BETA
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (BETA * reference_Y / (middle - REWARDS)).sum() > 1 else (low, middle)
    return (BETA * reference_Y / (high - REWARDS)).log()[None]


def test_the_penalised_optimum_is_the_tilted_reference(prove):
    def error():
        kinds = (
            KLInLoss(coefficient=BETA, estimator=K2()),
            KLInReward(coefficient=BETA, estimator=K1()),
            KLInReturn(coefficient=BETA, estimator=K1()),
            WeightedKLInLoss(coefficient=BETA, estimator=K3()),
        )
        still = [update(tilted(), kl).abs().max().item() for kl in kinds]
        off_policy = update(tilted(), kinds[-1], old=tilted()).abs().max().item()
        moving = [shortfall(update(ONE, kl).abs().max().item(), 1e-3) for kl in kinds]
        return worst(*still, off_policy, *moving)

    prove(
        "fixed point with k1 in the reward, k2 or weighted k3 in the loss: pi_ref exp(R/beta)/Z",
        "Liu et al. 2025 (arXiv 2510.01555)",
        error,
        wrong_sign("objective.regularizer.k2"),
        replaced("k3 for k2", "objective.regularizer.k2", k3),
        replaced("not weighted", "objective.regularizer.importance_weighted", lambda estimates, log_ratios: estimates),
    )


def test_k3_in_the_loss_has_another_optimum(prove):
    def error():
        kl = KLInLoss(coefficient=BETA, estimator=K3())
        return worst(
            update(hyperbolic(), kl).abs().max().item(),
            shortfall(update(tilted(), kl).abs().max().item(), 1e-3),
            shortfall(far(BANDIT.probabilities(hyperbolic()), BANDIT.probabilities(tilted())), 1e-2),
        )

    prove(
        "fixed point with k3 in the loss: beta pi_ref/(lambda - R), another policy",
        "DeepSeekMath, equation 4; Liu et al. 2025 (arXiv 2510.01555)",
        error,
        replaced("k2 for k3", "objective.regularizer.k3", k2),
    )


def climbed(kl):
    """Where ascent along the expected update ends, as probabilities; divided by pi it is the natural gradient."""
    logits = ONE
    for _ in range(60):
        logits = logits + update(logits, kl) / BANDIT.probabilities(logits)
    return BANDIT.probabilities(logits)


def test_ascent_reaches_the_fixed_points(prove):
    def error():
        ends = (
            (KLInLoss(coefficient=BETA, estimator=K2()), tilted()),
            (KLInReward(coefficient=BETA, estimator=K1()), tilted()),
            (KLInLoss(coefficient=BETA, estimator=K3()), hyperbolic()),
        )
        return worst((climbed(kl) - BANDIT.probabilities(end)).abs().sum().item() / 2 for kl, end in ends)

    # The distance shrinks by 1 - beta = 1/2 in a step where k1 or k2 penalises, so by 1e-18; alike with k3.
    prove(
        "exact ascent ends at these fixed points (total variation)",
        "Liu et al. 2025 (arXiv 2510.01555)",
        error,
        replaced("k3 for k2", "objective.regularizer.k2", k3),
        replaced("k2 for k3", "objective.regularizer.k3", k2),
    )


def test_at_the_reference_nothing_is_penalised(prove):
    def error():
        errors = []
        for kind in (K2, K3):
            for kl in (
                KLInLoss(coefficient=BETA, estimator=kind()),
                WeightedKLInLoss(coefficient=BETA, estimator=kind()),
            ):
                at = penalised(kl, SEQUENCES, policy=LONG, reference=LONG, old=LONG_OLD)
                values = kind()(LONG, LONG)
                errors += [at.abs().max().item(), values.abs().max().item()]
        return worst(errors)

    prove(
        "where policy and reference are one: k2, k3 and their gradients are exactly 0",
        "Schulman 2020, Approximating KL Divergence",
        error,
        replaced("k1 for k2", "objective.regularizer.k2", k1),
        Mutant("k3 without its -1", "objective.regularizer.k3", lambda f: lambda *args: f(*args) + 1),
        tolerance=0.0,
    )

"""Entropy: its bonus, the tokens that it selects, and how a step of the policy gradient changes it."""

from math import ceil

import torch
from enumeration import BANDIT, SEQUENCES, Expectation, far, gradient, worst
from mutants import Mutant, keyword, mask_off_by_one, replaced, wrong_sign
from objective_cases import ragged_minibatch

from grpo_lightning.functional.logprobs import logprobs_and_entropy
from grpo_lightning.objective import (
    EntropyBonus,
    GroupMean,
    LeaveOneOut,
    NoRatio,
    Objective,
    Reinforce,
    SequenceSum,
    TopEntropyTokens,
)

POLICY = SEQUENCES.policy(0)
SEQUENCE_SUM = "objective.aggregation.sequence_sum"


def build(entropy=None, advantage=None, masks=()):
    return Objective(
        advantage=advantage or GroupMean(),
        scale=None,
        ratio=NoRatio(),
        surrogate=Reinforce(),
        aggregation=SequenceSum(),
        entropy=entropy,
        masks=masks,
    )


def test_the_bonus_ascends_the_entropy_of_visited_states(prove):
    def error():
        start = torch.softmax(POLICY[0], dim=0)
        visits_S = torch.stack([torch.ones((), dtype=torch.float64), start[1], start[2]])

        def entropy(leaf):
            logprobs_SV = leaf.log_softmax(dim=1)
            return -(visits_S * (logprobs_SV.exp() * logprobs_SV).sum(dim=1)).sum()

        at = Expectation(policy=POLICY, rewards=torch.zeros(7, dtype=torch.float64), group_size=2)
        return far(at.ascent(build(EntropyBonus(coefficient=0.3))), 0.3 * gradient(entropy, POLICY))

    prove(
        "the bonus, summed over tokens: coefficient times the gradient of each state's entropy by its visits",
        "Williams and Peng 1991; A3C, section 4",
        error,
        mask_off_by_one(SEQUENCE_SUM),
        bonus_as_penalty(),
    )


def bonus_as_penalty():
    """The bonus as a penalty."""

    def wrap(loss):
        def mutated(self, scores, *args):
            return loss(self, scores._replace(entropy_BT=-scores.entropy_BT), *args)

        return mutated

    return Mutant("wrong sign", "objective.objective.Objective.loss", wrap)


def test_a_step_changes_the_entropy_by_a_covariance(prove):
    def error():
        eta, policy = 1e-6, BANDIT.policy(0)
        rewards = torch.tensor([1.0, 0.2, -0.4], dtype=torch.float64)
        update = Expectation(space=BANDIT, policy=policy, rewards=rewards, group_size=2).ascent(
            build(advantage=LeaveOneOut())
        )

        def entropy(logits_SV):
            return logprobs_and_entropy(logits_SV, torch.zeros(1, dtype=torch.long), temperature=1.0)[1].item()

        probabilities = BANDIT.probabilities(policy)
        logprobs = probabilities.log()
        # The policy gradient in the logits is pi A; its covariance with log pi, under pi.
        step = probabilities * (rewards - (probabilities * rewards).sum())
        centred = step - (probabilities * step).sum()
        covariance = (probabilities * logprobs * centred).sum().item()
        by_hand = -(probabilities * logprobs).sum().item()
        change = entropy(policy + eta * update) - entropy(policy)
        # To first order in eta = 1e-6, and with 1e-16 of rounding in a difference of 1e-7.
        return worst(abs(change / (-eta * covariance) - 1), abs(entropy(policy) - by_hand))

    prove(
        "one step of the policy gradient changes the entropy by -eta Cov(log pi, change of the logits)",
        "The Entropy Mechanism of RL (arXiv 2505.22617), section 3",
        error,
        wrong_sign("objective.surrogate.log_likelihood"),
        tolerance=1e-4,
    )


def test_the_most_uncertain_tokens_are_kept(prove):
    def error():
        errors = []
        for count, share in ((10, 0.2), (7, 0.5), (5, 1.0), (3, 0.1)):
            entropies_N = torch.randperm(count, generator=torch.Generator().manual_seed(count)).double()
            threshold = TopEntropyTokens(share=share).threshold(entropies_N)
            kept = (entropies_N >= threshold).sum().item()
            errors.append(abs(kept - ceil(share * count)))
        minibatch = ragged_minibatch()
        policy_mask_BT = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
        masked = minibatch.batch._replace(policy_mask_BT=policy_mask_BT)
        objective = build(masks=(TopEntropyTokens(share=0.5),))
        whole = minibatch.gradient(objective)
        minibatch.batch = masked
        return worst(*errors, far(minibatch.gradient(objective), whole * policy_mask_BT))

    prove(
        "ceil(share N) tokens are kept; the others lose their policy gradient and stay in the denominator",
        "Beyond the 80/20 Rule, equation 6",
        error,
        keyword("one token fewer", "objective.mask.top_entropy_threshold", share=lambda share: 0.7 * share),
        replaced("not masked", "objective.objective.Objective._kept", lambda self, *args: None),
        tolerance=1e-10,
    )

"""Every overlay against its paper, written once more with loops over groups, completions and tokens."""

import random
from dataclasses import fields, is_dataclass, replace
from functools import cache

import pytest
import replay
import torch
from papers.batches import Iteration, answers, random_iteration
from papers.formulas import PAPERS
from papers.overlays import NAMES, learning, padded_minibatch
from torch.nn.functional import pad

from grpo_lightning.objective import (
    ConstantLength,
    NoRatio,
    PromptMeanTokenMean,
    Reinforce,
    RewardPenalty,
    SequenceMeanTokenMean,
    SequenceSum,
    TokenMean,
)

SEEDS = (1, 2, 3)
AGGREGATIONS = (
    SequenceMeanTokenMean(),
    TokenMean(),
    PromptMeanTokenMean(),
    SequenceSum(),
    ConstantLength(length=7.0),
)
NOTICED = 1e-8
"""A hundred times what the comparison lets pass."""
WITHOUT_EFFECT = {("r1_zero", "surrogate.clip_low")}
"""A bound of 1 - 10 is below every ratio."""


def policy(iteration: Iteration, update: int) -> torch.Tensor:
    return torch.tensor(iteration.now(update), dtype=torch.float64)


@cache
def of_the_paper(name, seed, update, part, num_parts):
    """The loss of a minibatch and its gradient, by the paper."""
    iteration = random_iteration(seed)
    leaf = policy(iteration, update).requires_grad_()
    groups = answers(iteration, leaf)
    size = len(groups) // num_parts
    objective = PAPERS[name](groups[part * size : (part + 1) * size], groups)
    return -objective.detach(), -torch.autograd.grad(objective, leaf)[0]


def distance(name, seed, objective=None):
    """The largest difference in any loss or gradient of the updates of an iteration."""
    iteration, worst = random_iteration(seed), 0.0
    mine = learning(name, iteration, objective)
    num_parts = len(mine.experience.minibatches)
    for update in range(mine.num_updates):
        loss, gradient = mine.loss_and_gradient(update, policy(iteration, update))
        wanted_loss, wanted = of_the_paper(name, seed, update, update % num_parts, num_parts)
        assert wanted.norm() > 0
        worst = max(worst, float((loss - wanted_loss).abs()), float((gradient - wanted).abs().max()))
    return worst


def test_every_overlay_has_its_paper():
    assert sorted(PAPERS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_are_the_paper_s(name):
    for seed in SEEDS:
        assert distance(name, seed) < 1e-10  # of losses up to 10, in fp64


def altered(part, path=""):
    """The part with each of its numbers changed, one at a time, and the number's name."""
    for field in fields(part):
        value, place = getattr(part, field.name), f"{path}{field.name}"
        if field.name == "ddof":
            yield place, replace(part, ddof=1 - value)
        elif field.name == "epsilon":
            yield place, replace(part, epsilon=value + 1e-3)
        elif isinstance(value, int | float):
            yield place, replace(part, **{field.name: value + 1 if isinstance(value, int) else 1.5 * value})
        elif is_dataclass(value):
            yield from ((where, replace(part, **{field.name: other})) for where, other in altered(value, f"{place}."))
        elif isinstance(value, tuple):
            for i, one in enumerate(value):
                for where, other in altered(one, f"{place}."):
                    yield where, replace(part, **{field.name: (*value[:i], other, *value[i + 1 :])})


@pytest.mark.parametrize("name", NAMES)
def test_the_comparison_notices_every_setting(name):
    """The random iterations reach every bound, and every number has its part in the loss."""
    objective = replay.overlay(name)
    for place, other in altered(objective):
        notices = any(distance(name, seed, other) > NOTICED for seed in SEEDS)
        assert notices == ((name, place) not in WITHOUT_EFFECT), place


@pytest.mark.parametrize("name", NAMES)
def test_the_comparison_notices_another_aggregation(name):
    objective = replay.overlay(name)
    for other in AGGREGATIONS:
        if type(other) is not type(objective.aggregation):
            assert distance(name, SEEDS[0], replace(objective, aggregation=other)) > NOTICED, other


@pytest.mark.parametrize("name", NAMES)
def test_no_partition_into_micro_batches_enters(name):
    """With the partition the padding changes too: a micro-batch is as wide as its longest completion."""
    iteration = random_iteration(4)
    mine = learning(name, iteration)
    update = mine.num_updates - 1
    now, order = policy(iteration, update), list(range(len(mine.samples(update))))
    loss, gradient = mine.loss_and_gradient(update, now)
    shuffled = random.Random(4).sample(order, len(order))
    for cut in ([[i] for i in order], [shuffled[:1], shuffled[1:4], shuffled[4:]]):
        part_loss, part_gradient = mine.loss_and_gradient(update, now, cut)
        assert (part_loss - loss).abs() < 1e-12
        assert (part_gradient - gradient).abs().max() < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_in_the_padding_does_not_enter(name):
    iteration = random_iteration(5)
    mine = learning(name, iteration)
    update = mine.num_updates - 1
    scores, batch = padded_minibatch(mine, update, policy(iteration, update))
    output = mine.objective.loss(scores, batch, mine.experience.counts_of(update), mine.objective.coefficients)
    gradient = torch.autograd.grad(output.loss, scores.logprobs_BT)[0]
    assert gradient[~batch.mask_BT].abs().max() == 0

    def stuffed(part):
        """The part with three more columns, and 7 wherever there is no loss token."""
        if part is None or part.dim() < 2 or part.shape[1] == 1:
            return part
        if part.dtype == torch.bool:
            return pad(part, (0, 3))
        return pad(part.masked_fill(~batch.mask_BT, 7.0), (0, 3), value=7.0)

    wide_scores = type(scores)(*(stuffed(part).detach().requires_grad_() for part in scores))
    wide_batch = type(batch)(*(stuffed(part) for part in batch))
    wide = mine.objective.loss(wide_scores, wide_batch, mine.experience.counts_of(update), mine.objective.coefficients)
    wide_gradient = torch.autograd.grad(wide.loss, wide_scores.logprobs_BT)[0]
    assert (wide.loss - output.loss).abs() < 1e-12
    assert (wide_gradient[:, :-3] - gradient).abs().max() < 1e-12
    assert wide_gradient[~wide_batch.mask_BT].abs().max() == 0


@pytest.mark.parametrize("signs", [(1,), (-1,), (1, -1, -1)], ids=["likelier", "less likely", "both"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_are_finite_where_a_log_ratio_is_fifty(name, signs):
    iteration = random_iteration(6)
    shifts = [50.0 * signs[n % len(signs)] for n in range(len(iteration.old))]
    far = replace(iteration, drift=shifts, reference=[o - s for o, s in zip(iteration.old, shifts, strict=True)])
    mine = learning(name, far)
    update = min(1, mine.num_updates - 1)
    loss, gradient = mine.loss_and_gradient(update, policy(far, 1))
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_on_policy_the_policy_gradient_is_that_of_reinforce(name):
    """Of A log pi, under the same aggregation: for every overlay, without a factor.

    The one ratio of a completion spreads its gradient evenly over the completion, whose tokens share an advantage.
    """
    iteration = random_iteration(7)
    on_policy = replace(iteration, old=iteration.sampler)
    stated = replay.overlay(name)
    in_reward = stated.kl if isinstance(stated.kl, RewardPenalty) else None
    mine = learning(name, on_policy, replace(stated, kl=in_reward))
    plain = replace(stated, kl=in_reward, surrogate=Reinforce(), ratio=NoRatio(), correction=None, masks=())
    _, gradient = mine.loss_and_gradient(0, policy(on_policy, 0))
    _, wanted = learning(name, on_policy, plain).loss_and_gradient(0, policy(on_policy, 0))
    assert wanted.norm() > 0
    assert (gradient - wanted).abs().max() < 1e-12

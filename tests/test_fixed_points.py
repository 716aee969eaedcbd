"""Where a penalised policy ends, trained through the real module: the tilted reference, or that of k3 in the loss."""

from functools import partial
from statistics import mean, stdev

import pytest
import torch
from bandit import (
    BETA,
    EveryArm,
    exact,
    hyperbolic,
    probabilities_of,
    reference,
    sampled,
    tilted,
    total_variation,
    train,
)

from grpo_lightning.objective import K1, K2, K3, KLInLoss, KLInReward
from grpo_lightning.optim import Schedule

PENALTIES = {
    "k1 in the reward": (KLInReward, K1, tilted, hyperbolic),
    "k2 in the loss": (KLInLoss, K2, tilted, hyperbolic),
    "k3 in the loss": (KLInLoss, K3, hyperbolic, tilted),
}
"""Place and estimator of the penalty, the policy that its training ends in, and the one that it does not end in."""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return reference(tmp_path_factory.mktemp("bandit") / "reference")


def ascent(path, kl):
    """Exact: every arm counts by its probability. In 150 steps of momentum the distance falls below 1e-7.

    The penalty is what curves the objective, so the steps are shorter where it is stronger.
    """
    optimizer = partial(torch.optim.SGD, lr=0.5 / kl.coefficient, momentum=0.8)
    shape = {"prompts_per_iteration": 1, "group_size": 6, "engine": EveryArm()}
    return train(path, exact(kl), steps=150, optimizer=optimizer, **shape)


def test_the_two_fixed_points_are_two_policies(path):
    start = probabilities_of(path)
    # Far enough from each other, from the start, and from where twice the coefficient leads, to tell a miss.
    for end in (tilted, hyperbolic):
        assert total_variation(end(start), start) > 0.1
        assert total_variation(end(start), end(start, 2 * BETA)) > 0.1
    assert total_variation(tilted(start), hyperbolic(start)) > 0.1


@pytest.mark.parametrize("name", PENALTIES)
def test_exact_ascent_ends_at_the_fixed_point(path, name):
    place, estimator, end, other = PENALTIES[name]
    got, start = ascent(path, place(coefficient=BETA, estimator=estimator())), probabilities_of(path)
    assert total_variation(got, end(start)) <= 1e-6
    assert total_variation(got, other(start)) > 0.1


def test_twice_the_coefficient_ends_elsewhere(path):
    got, start = ascent(path, KLInLoss(coefficient=2 * BETA, estimator=K2())), probabilities_of(path)
    assert total_variation(got, tilted(start)) > 0.1
    assert total_variation(got, tilted(start, 2 * BETA)) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", PENALTIES)
def test_sampled_training_ends_at_the_fixed_point(path, name):
    place, estimator, end, other = PENALTIES[name]
    start, distances = probabilities_of(path), []
    for seed in (1, 2, 3):
        got = train(
            path,
            sampled(place(coefficient=BETA, estimator=estimator())),
            steps=150,
            optimizer=partial(torch.optim.SGD, lr=0.3, momentum=0.9),
            schedule=Schedule(decay="linear"),  # to 0, so that the noise of the last steps averages out
            prompts_per_iteration=1,
            group_size=128,
            seed=seed,
        )
        distances.append(total_variation(got, end(start)))
        assert total_variation(got, other(start)) > 0.1
    assert mean(distances) + 5 * stdev(distances) / 3**0.5 <= 0.03, distances

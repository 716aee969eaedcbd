"""What the tests against TRL have in common: a base point of the grid, and how equal is equal."""

import torch

from grpo_lightning.objective import Clipped, GroupMean, GroupStd, Objective, TokenMean, TokenRatio
from peers.rollout import Outcome

TOLERANCE = 1e-10
"""Both sides compute in fp64 on values of order one; what is left is the order of a few additions."""
CLIPS = {"epsilon": 0.1, "epsilon_high": 0.3}


def objective(**parts) -> Objective:
    """TRL's default, `loss_type="dapo"`, under `CLIPS`, with some parts replaced."""
    base = {
        "advantage": GroupMean(),
        "scale": GroupStd(ddof=1, epsilon=1e-4),
        "ratio": TokenRatio(),
        "surrogate": Clipped(clip_low=0.1, clip_high=0.3),
        "aggregation": TokenMean(),
    }
    return Objective(**(base | parts))


def assert_same(peer: Outcome, ours: Outcome, *, factor: float = 1.0) -> None:
    """TRL's loss and gradients are ours times a factor."""
    assert abs(peer.loss - factor * ours.loss) <= TOLERANCE
    torch.testing.assert_close(peer.gradient_BT, factor * ours.gradient_BT, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(peer.entropy_gradient_BT, factor * ours.entropy_gradient_BT, rtol=0, atol=TOLERANCE)


def assert_distinct(one: Outcome, other: Outcome) -> None:
    """What tells the two apart really acts on the recorded rollout."""
    gradients = [torch.cat([outcome.gradient_BT, outcome.entropy_gradient_BT]) for outcome in (one, other)]
    assert (gradients[0] - gradients[1]).abs().max() > 1e-4

"""1/|o| makes wrong answers longer; a constant denominator does not (Dr. GRPO, https://arxiv.org/abs/2503.20783).

The first character is the answer, and whatever follows is rambling: how long it is does not decide what is right. A
wrong completion has a negative advantage, which the mean over its own tokens spreads the thinner the longer it is.
"""

from collections.abc import Mapping
from functools import partial

import torch

from grpo_lightning import GRPOModule
from grpo_lightning.objective import (
    Aggregation,
    Clipped,
    ConstantLength,
    GroupMean,
    Objective,
    SequenceMeanTokenMean,
    TokenRatio,
)
from grpo_lightning.types import SamplingParams
from tools.experiments.cold_start import adamw
from tools.experiments.experiment import Comparison, Experiment, Panel, main
from tools.experiments.outcome import growth
from tools.experiments.rambling import AnswerFirst, policy, sums
from tools.experiments.training import Curves, train

MAX_NEW_TOKENS = 40
AGGREGATIONS: dict[str, Aggregation] = {
    "sequence mean": SequenceMeanTokenMean(),
    "constant": ConstantLength(length=MAX_NEW_TOKENS),
}


def lengths(module: GRPOModule) -> Mapping[str, float]:
    """The mean lengths of right and of wrong completions, and the share of the right ones."""
    assert module.rollout is not None
    assert module.rewards is not None
    lengths_B = torch.tensor([float(len(c.token_ids)) for c in module.rollout.completions])
    right_B = module.rewards.totals_B == 1
    return {
        "right": float(lengths_B[right_B].mean()),
        "wrong": float(lengths_B[~right_B].mean()),
        "accuracy": float(right_B.double().mean()),
    }


def train_arm(arm: str, *, seed: int, num_updates: int) -> Curves:
    """GRPO without a deviation; the arms differ in the aggregation."""
    module = GRPOModule(
        policy(),
        Objective(
            advantage=GroupMean(),
            scale=None,
            ratio=TokenRatio(),
            surrogate=Clipped(clip_low=0.2, clip_high=0.2),
            aggregation=AGGREGATIONS[arm],
        ),
        SamplingParams(max_new_tokens=MAX_NEW_TOKENS),
        partial(adamw, lr=3e-4),
        prompts_per_iteration=32,
        group_size=8,
        seed=seed,
    )
    # Adam takes the scale out of the gradients, in which the arms differ; a bound of their norm would not.
    return train(
        module, sums(seed=seed), AnswerFirst(), num_updates=num_updates, measure=lengths, gradient_clip_val=None
    )


def outcome(curves: Curves) -> float:
    """By how much wrong completions have grown, in tokens."""
    return growth(curves["wrong"], 5)


EXPERIMENT = Experiment(
    name="length_bias",
    arms=tuple(AGGREGATIONS),
    num_updates=30,
    train=train_arm,
    outcome=outcome,
    outcome_label="growth of wrong completions, in tokens",
    comparisons=(Comparison(larger="sequence mean"), Comparison(larger="sequence mean", smaller="constant")),
    panels=(
        Panel(x="update", y="wrong", label="tokens of a wrong completion"),
        Panel(x="update", y="right", label="tokens of a right completion"),
        Panel(x="update", y="accuracy", label="share of right completions"),
    ),
)


if __name__ == "__main__":
    main(EXPERIMENT)

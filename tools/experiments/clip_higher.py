"""Clip-higher keeps more entropy than the symmetric clip (DAPO, section 3.1, https://arxiv.org/abs/2503.14476).

Any even digit is as good as another. With eight updates per rollout the clip takes effect: above 1 + eps it stops what
is being learned from good tokens.
"""

from functools import partial

from grpo_lightning import GRPOModule
from grpo_lightning.objective import Clipped, GroupMean, GroupStd, Objective, TokenMean, TokenRatio
from grpo_lightning.types import SamplingParams
from tools.experiments.cold_start import adamw
from tools.experiments.digits import Numbered, ShareOf, random_policy
from tools.experiments.experiment import Comparison, Experiment, Panel, main
from tools.experiments.outcome import mean_of_last
from tools.experiments.training import Curves, train

LENGTH = 8
CLIP_HIGH = {"0.2 / 0.28": 0.28, "0.2 / 0.2": 0.2}


def train_arm(arm: str, *, seed: int, num_updates: int) -> Curves:
    """Eight updates on each rollout; the arms differ in the upper clip."""
    module = GRPOModule(
        random_policy(),
        Objective(
            advantage=GroupMean(),
            scale=GroupStd(ddof=1, epsilon=1e-6),
            ratio=TokenRatio(),
            surrogate=Clipped(clip_low=0.2, clip_high=CLIP_HIGH[arm]),
            aggregation=TokenMean(),
        ),
        SamplingParams(max_new_tokens=LENGTH, min_new_tokens=LENGTH),
        partial(adamw, lr=3e-3),
        prompts_per_iteration=16,
        group_size=8,
        num_minibatches=8,
        seed=seed,
    )
    metrics = ("policy/entropy", "reward/mean")
    return train(module, Numbered(), ShareOf("02468"), num_updates=num_updates, metrics=metrics)


def outcome(curves: Curves) -> float:
    """The mean entropy of the second half of the run, in nats per token."""
    return mean_of_last(curves["policy/entropy"], len(curves["policy/entropy"]) // 2)


EXPERIMENT = Experiment(
    name="clip_higher",
    arms=tuple(CLIP_HIGH),
    num_updates=160,
    train=train_arm,
    outcome=outcome,
    outcome_label="entropy in nats, mean of the second half",
    comparisons=(Comparison(larger="0.2 / 0.28", smaller="0.2 / 0.2"),),
    panels=(
        Panel(x="update", y="policy/entropy", label="entropy, nats per token"),
        Panel(x="update", y="reward/mean", label="share of even digits"),
    ),
)


if __name__ == "__main__":
    main(EXPERIMENT)

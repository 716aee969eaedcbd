"""Clip-higher keeps more entropy than the symmetric clip (DAPO, section 3.1, https://arxiv.org/abs/2503.14476).

A coin is tossed for each completion, so that no token is better than another, and what the clip does to the entropy is
all that happens. The policy begins with one frequent token. With eight updates on each rollout, a rare token that was
lucky meets 1 + eps_high, and one that was not meets 1 - eps_low. Their distances from 1 in logarithms are 0.182 and
0.223 under 0.2 / 0.2, by which rare tokens lose; 0.247 and 0.223 under 0.2 / 0.28.
"""

from collections.abc import Sequence
from functools import partial
from random import Random

from grpo_lightning import GRPOModule
from grpo_lightning.data.encoding import Row
from grpo_lightning.objective import Clipped, GroupMean, GroupStd, Objective, TokenMean, TokenRatio
from grpo_lightning.rewards import RewardCallback
from grpo_lightning.types import Completion, Prompt, SamplingParams
from tools.experiments.cold_start import adamw, cold_start
from tools.experiments.digits import Numbered, random_policy
from tools.experiments.experiment import Comparison, Experiment, Panel, main
from tools.experiments.outcome import mean_of_last
from tools.experiments.training import Curves, train

LENGTH = 8
UPDATES_PER_ROLLOUT = 8
FREQUENT_SHARE = 0.8
"""Of the demonstrations' tokens."""
COPIES = 40
"""Demonstrations of each prompt."""
CLIP_HIGH = {"0.2 / 0.28": 0.28, "0.2 / 0.2": 0.2}


class Coin(RewardCallback):
    """0 or 1 by chance, whatever the completion.

    Args:
        seed: Of the coin.
    """

    def __init__(self, seed: int) -> None:
        super().__init__("coin")
        self.chance = Random(seed)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:  # noqa: ARG002
        """One toss for each completion."""
        return [float(self.chance.random() < 0.5) for _ in completions]


class MostlyZeros(Numbered):
    """Demonstrations of eight digits: 0 in four of five places, and in the others any digit."""

    def demonstration_rows(self) -> Sequence[Row]:
        """The same in every run."""
        chance = Random(0)
        return [
            {**row, "demonstration": "".join(_digit(chance) for _ in range(LENGTH))}
            for row in self.rows("train")
            for _ in range(COPIES)
        ]


def _digit(chance: Random) -> str:
    return "0" if chance.random() < FREQUENT_SHARE else chance.choice("0123456789")


def train_arm(arm: str, *, seed: int, num_updates: int) -> Curves:
    """Eight updates on each rollout; the arms differ in the upper clip."""
    module = GRPOModule(
        cold_start("mostly_zeros", random_policy(), MostlyZeros(), num_updates=100),
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
        num_epochs=UPDATES_PER_ROLLOUT,
        seed=seed,
    )
    return train(
        module,
        Numbered(),
        Coin(seed),
        num_updates=num_updates,
        metrics=("policy/entropy",),
        last_metrics=("policy/clip_high", "policy/clip_low"),
    )


def outcome(curves: Curves) -> float:
    """The mean entropy of the second half of the run, in nats per token."""
    return mean_of_last(curves["policy/entropy"], len(curves["policy/entropy"]) // 2)


EXPERIMENT = Experiment(
    name="clip_higher",
    arms=tuple(CLIP_HIGH),
    num_updates=30 * UPDATES_PER_ROLLOUT,
    train=train_arm,
    outcome=outcome,
    outcome_label="entropy in nats, mean of the second half",
    comparisons=(Comparison(larger="0.2 / 0.28", smaller="0.2 / 0.2"),),
    panels=(
        Panel(x="update", y="policy/entropy", label="entropy, nats per token"),
        Panel(x="update", y="policy/clip_high", label="share above the upper clip"),
        Panel(x="update", y="policy/clip_low", label="share below the lower clip"),
    ),
)


if __name__ == "__main__":
    main(EXPERIMENT)

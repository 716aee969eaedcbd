"""Dynamic sampling with refill reaches an accuracy in fewer updates (DAPO, https://arxiv.org/abs/2503.14476).

Groups whose rewards are all equal have no advantage. With refill, others take their places, at the price of drawing
more completions.
"""

from collections.abc import Sequence
from functools import partial

from grpo_lightning import GRPOModule
from grpo_lightning.data.encoding import Row, Split
from grpo_lightning.evaluation import Evaluation
from grpo_lightning.groups import DynamicSampling, GroupFilter, KeepAll
from grpo_lightning.objective import Clipped, GroupMean, GroupStd, Objective, TokenMean, TokenRatio
from grpo_lightning.types import SamplingParams
from tools.experiments.cold_start import adamw
from tools.experiments.experiment import Comparison, Experiment, Panel, main
from tools.experiments.outcome import updates_to
from tools.experiments.rambling import AnswerFirst, RamblingSums, policy
from tools.experiments.training import Curves, train

TARGET = 0.7
GROUPS: dict[str, GroupFilter] = {"without": KeepAll(), "with refill": DynamicSampling(max_rounds=8)}


class OwnSums(RamblingSums):
    """Judged by the very problems that are trained on: what is asked is how fast these are learned."""

    def __init__(self) -> None:
        super().__init__(
            kind="modular", operators="+-", num_terms=2, num_train=128, num_validation=0, num_test=0,
            num_demonstrations=0,
        )  # fmt: skip
        self.allow_overlap = True

    def rows(self, split: Split) -> Sequence[Row]:
        """The problems of a split; half of the training problems are the validation split."""
        return super().rows("train")[:64] if split == "validation" else super().rows(split)


def train_arm(arm: str, *, seed: int, num_updates: int) -> Curves:
    """Answers to sums, of which only the first character is drawn; the arms differ in the group filter."""
    module = GRPOModule(
        policy(),
        Objective(
            advantage=GroupMean(),
            scale=GroupStd(ddof=1, epsilon=1e-6),
            ratio=TokenRatio(),
            surrogate=Clipped(clip_low=0.2, clip_high=0.28),
            aggregation=TokenMean(),
        ),
        SamplingParams(max_new_tokens=1),
        partial(adamw, lr=1e-3),
        prompts_per_iteration=16,
        group_size=2,
        groups=GROUPS[arm],
        evaluation=Evaluation(greedy=False, num_samples=8),
        seed=seed,
    )
    metrics = ("completion/tokens", "reward/groups_with_signal")
    return train(module, OwnSums(), AnswerFirst(), num_updates=num_updates, metrics=metrics, evaluate_every=2)


def outcome(curves: Curves) -> float:
    """Updates to the target."""
    return updates_to(curves, TARGET)


EXPERIMENT = Experiment(
    name="dynamic_sampling",
    arms=tuple(GROUPS),
    num_updates=70,
    train=train_arm,
    outcome=outcome,
    outcome_label=f"updates to an accuracy of {TARGET}",
    comparisons=(Comparison(larger="without", smaller="with refill"),),
    panels=(
        Panel(x="evaluated", y="held_out", label="accuracy, sampled"),
        Panel(x="update", y="reward/groups_with_signal", label="share of groups with a signal"),
        Panel(x="update", y="completion/tokens", label="completions drawn"),
    ),
)


if __name__ == "__main__":
    main(EXPERIMENT)

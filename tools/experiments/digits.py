"""The smallest task: a random decoder of 15,000 weights, empty prompts, and a reward for some of the digits."""

from collections.abc import Sequence

from grpo_lightning.data import PromptDataModule
from grpo_lightning.data.encoding import Row, Split
from grpo_lightning.policy import CharacterPolicy
from grpo_lightning.rewards import RewardCallback
from grpo_lightning.types import Completion, Prompt


class Numbered(PromptDataModule):
    """Prompts that ask for nothing, ``17=``: 64 to train on, 16 held out."""

    def rows(self, split: Split) -> Sequence[Row]:
        """The prompts of a split."""
        numbers = {"train": range(64), "validation": range(64, 80), "test": range(0)}[split]
        return [{"prompt": f"{number}="} for number in numbers]


class ShareOf(RewardCallback):
    """The share of a completion's tokens that are among `digits`.

    Args:
        digits: What is rewarded.
    """

    def __init__(self, digits: str) -> None:
        super().__init__("share")
        self.digits = digits

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:  # noqa: ARG002
        """In [0, 1] for each completion."""
        return [sum(c.text.count(digit) for digit in self.digits) / len(c.token_ids) for c in completions]


def random_policy() -> CharacterPolicy:
    """Random weights, which the run's seed draws."""
    return CharacterPolicy("0123456789=", hidden_size=32, num_layers=1, num_heads=2, max_positions=64)

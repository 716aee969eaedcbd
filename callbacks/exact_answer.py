"""Reward: the final answer equals the key."""

from collections.abc import Sequence

from grpo_lightning.rewards import RewardCallback
from grpo_lightning.types import Completion, Prompt


class ExactAnswer(RewardCallback):
    """1 where the text after the last marker equals the data's answer, 0 otherwise; blanks around it do not count.

    Args:
        column: The data's column that holds the answer.
        marker: What the answer follows; None compares the whole completion.
        name: Of the reward.
        weight: Factor of this reward in a completion's total.
    """

    def __init__(
        self, column: str = "answer", marker: str | None = "#", name: str = "exact_answer", weight: float = 1.0
    ) -> None:
        super().__init__(name=name, weight=weight)
        self.column = column
        self.marker = marker

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
        """Compare each answer with its key."""
        return [
            float(self.answer(completion) == str(prompt.columns[self.column]).strip())
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    def answer(self, completion: Completion) -> str | None:
        """The text after the last marker; None where there is no marker, or nothing after it."""
        if self.marker is not None and self.marker not in completion.text:
            return None
        return completion.text.rsplit(self.marker, 1)[-1].strip() or None

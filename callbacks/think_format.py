"""Reward: the completion thinks first, then answers, in the form of DeepSeek-R1."""

from collections.abc import Sequence

from grpo_lightning.rewards import RewardCallback
from grpo_lightning.rewards.parsing import think_and_answer
from grpo_lightning.types import Completion, Prompt, Score


class ThinkFormat(RewardCallback):
    """1 if the completion is exactly ``<think>...</think><answer>...</answer>``, else 0.

    The grammar, with whitespace allowed around and between the two parts::

        completion = "<think>" content "</think>" "<answer>" content "</answer>"
        content    = any text that is not blank and has none of the four tags in it

    Source: DeepSeek-R1 (https://arxiv.org/abs/2501.12948), section 2.2.2 on the format reward and table 1, whose
    template asks for these tags.

    Args:
        prompt_opens_think: The prompt ends with ``<think>``, as some chat templates have it; then the completion
            starts inside, and must not open it again.
        correct: The score of the right form.
        incorrect: The score of any other.
        name: The reward's name.
        weight: Factor of this reward in a completion's total.
    """

    def __init__(
        self,
        prompt_opens_think: bool = False,
        correct: float = 1.0,
        incorrect: float = 0.0,
        name: str = "think_format",
        weight: float = 1.0,
    ) -> None:
        super().__init__(name, weight)
        self.prompt_opens_think = prompt_opens_think
        self.correct = correct
        self.incorrect = incorrect

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Score]:  # noqa: ARG002
        """`correct` or `incorrect` for each completion."""
        return [self.incorrect if self.answer(completion) is None else self.correct for completion in completions]

    def answer(self, completion: Completion) -> str | None:
        """The content of ``<answer>``, where the form is right."""
        parts = think_and_answer(completion.text, prompt_opens_think=self.prompt_opens_think)
        return None if parts is None else parts.answer

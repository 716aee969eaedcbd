"""Reward: reasoning and answer stand where they belong."""

import re
from collections.abc import Sequence

from grpo_lightning.rewards import RewardCallback
from grpo_lightning.types import Completion, Prompt

_FORMAT = re.compile(r"\s*<think>(?P<thinking>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")


class ThinkFormat(RewardCallback):
    """1 where the completion is ``<think>...</think><answer>...</answer>``, each once and not empty; 0 otherwise.

    Args:
        name: Of the reward.
        weight: Factor of this reward in a completion's total.

    Source: DeepSeek-R1, section 2.2 (https://arxiv.org/abs/2501.12948).
    """

    def __init__(self, name: str = "think_format", weight: float = 1.0) -> None:
        super().__init__(name=name, weight=weight)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:  # noqa: ARG002
        """Look at the text alone."""
        return [float(self.answer(completion) is not None) for completion in completions]

    def answer(self, completion: Completion) -> str | None:
        """The text between the answer tags; None where the format is broken."""
        match = _FORMAT.fullmatch(completion.text)
        if match is None or len(_TAG.findall(completion.text)) != 4 or not match["thinking"].strip():
            return None
        return match["answer"].strip() or None

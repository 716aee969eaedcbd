"""Reward: the score that a reasoning-gym task's own verifier gives."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from grpo_lightning.rewards import RewardCallback
from grpo_lightning.types import Completion, Prompt

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class ReasoningGymScore(RewardCallback):
    """The verifier's score, in [0, 1], of the text between the answer tags, or of the whole completion without them.

    Args:
        name: Of the reward.
        weight: Factor of this reward in a completion's total.
    """

    def __init__(self, name: str = "reasoning_gym", weight: float = 1.0) -> None:
        super().__init__(name=name, weight=weight)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
        """Ask each task's verifier."""
        return [
            float(
                _verifier(str(prompt.columns["task"])).score_answer(
                    self.answer(completion), {"question": prompt.text, **prompt.columns}
                )
            )
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    def answer(self, completion: Completion) -> str | None:
        """The last answer between tags, or the whole text."""
        found = _ANSWER.findall(completion.text)
        return (found[-1] if found else completion.text).strip() or None


@cache
def _verifier(task: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, size=1, seed=0)

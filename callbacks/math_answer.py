"""Reward: the answer is mathematically equal to the expected one."""

import importlib.util
from collections.abc import Sequence
from typing import Literal

from grpo_lightning.rewards import RewardCallback, math_verification
from grpo_lightning.rewards.isolated_scoring import IsolatedScoring
from grpo_lightning.rewards.isolation import FunctionSource
from grpo_lightning.rewards.parsing import after_marker, boxed, last_number
from grpo_lightning.types import Completion, ConfigurationError, Prompt, Score


class MathAnswer(RewardCallback):
    r"""1 if math-verify finds the completion's answer equal to the row's, else 0.

    ``r = correct if verify(parse(row[column]), parse(completion)) else incorrect``

    Fractions, decimals, sets, intervals, matrices and expressions are compared as mathematics: ``\frac{1}{2}`` and
    ``0.5`` are one answer. What ``\boxed{...}`` holds takes precedence over other expressions, and a chain of thought
    before ``</think>`` is not looked at. An answer that cannot be read is incorrect. A row whose value is null or
    cannot be read gives None. A row's value in GSM8K's form ("... #### 72") is what stands behind the mark.

    The judgement runs in processes of its own with a deadline, because a completion can ask for ``9^{9^{9^9}}``.
    Source: https://github.com/huggingface/Math-Verify; installed with ``grpo_lightning[math]``.

    Args:
        column: The column with the expected answer.
        timeout_seconds: Longest time for one judgement, > 0.
        on_timeout: What a completion is worth whose judgement took longer. ``exclude``: it is a failure, and takes no
            part in the update. A number: that score.
        num_workers: How many processes judge.
        correct: The score of a right answer.
        incorrect: The score of any other.
        name: The reward's name.
        weight: Factor of this reward in a completion's total.

    Raises:
        ConfigurationError: math-verify is not installed, or a setting is out of its range.
    """

    def __init__(
        self,
        column: str = "answer",
        timeout_seconds: float = 10.0,
        on_timeout: Literal["exclude"] | float = "exclude",
        num_workers: int = 2,
        correct: float = 1.0,
        incorrect: float = 0.0,
        name: str = "math_answer",
        weight: float = 1.0,
    ) -> None:
        super().__init__(name, weight)
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigurationError("MathAnswer needs math-verify: pip install 'grpo_lightning[math]'")
        self.column = column
        self.correct = correct
        self.incorrect = incorrect
        # A name that cannot be imported, so that the worker loads the file without the package around it.
        source = FunctionSource("_math_verification", math_verification.__file__, "verify_answer")
        self._isolated = IsolatedScoring(
            source, timeout_seconds=timeout_seconds, on_timeout=on_timeout, num_workers=num_workers
        )

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Score]:
        """`correct`, `incorrect` or None for each completion."""
        expected = [self.read_column(prompt, self.column) for prompt in prompts]
        applicable = [index for index, value in enumerate(expected) if value is not None]
        calls = [
            {
                "expected": after_marker(str(expected[index]), "####") or str(expected[index]),
                "completion": _conclusion(completions[index].text),
                "correct": self.correct,
                "incorrect": self.incorrect,
            }
            for index in applicable
        ]
        scores: list[Score] = [None] * len(completions)
        for index, score in zip(applicable, self._isolated.score_each(self, calls), strict=True):
            scores[index] = score
        return scores

    def answer(self, completion: Completion) -> str | None:
        r"""What the last ``\boxed`` holds, else the last number. Votes are counted by letter, not by mathematics."""
        text = _conclusion(completion.text)
        number = last_number(text)
        return boxed(text) or (None if number is None else str(number))

    def close(self) -> None:
        """End the processes."""
        self._isolated.close()


def _conclusion(text: str) -> str:
    """What follows the chain of thought; the whole text where there is none."""
    return text.rpartition("</think>")[2]

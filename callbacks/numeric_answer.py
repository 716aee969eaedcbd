"""Reward: the answer is the expected number."""

from collections.abc import Sequence
from fractions import Fraction

from grpo_lightning.rewards import RewardCallback
from grpo_lightning.rewards.parsing import after_marker, last_number
from grpo_lightning.types import Completion, ConfigurationError, Prompt, Score


class NumericAnswer(RewardCallback):
    """1 if the completion's last number equals the row's, within a tolerance, else 0.

    ``r = correct if |a - e| <= max(absolute_tolerance, relative_tolerance * |e|) else incorrect``

    with a the completion's number and e the row's, both read exactly by `grpo_lightning.rewards.parsing.last_number`.
    The row's is its last number too, so that GSM8K's worked solutions ("... #### 72") serve as they are. A completion
    without a number is incorrect. A row whose value is null gives None.

    Args:
        column: The column with the expected answer.
        marker: Look only behind the last occurrence of this, for instance ``####``; empty for the whole completion.
        end_marker: Look only up to this, for instance ``</answer>``; empty for the end of the line behind `marker`.
        absolute_tolerance: Largest difference, >= 0.
        relative_tolerance: Largest difference as a share of the expected number, >= 0.
        correct: The score of a right answer.
        incorrect: The score of any other.
        name: The reward's name.
        weight: Factor of this reward in a completion's total.

    Raises:
        ConfigurationError: A tolerance is negative, a marker is null, or a row's value has no number in it.
    """

    def __init__(
        self,
        column: str = "answer",
        marker: str = "",
        end_marker: str = "",
        absolute_tolerance: float = 0.0,
        relative_tolerance: float = 1e-6,
        correct: float = 1.0,
        incorrect: float = 0.0,
        name: str = "numeric_answer",
        weight: float = 1.0,
    ) -> None:
        super().__init__(name, weight)
        if marker is None or end_marker is None:  # jsonargparse reads "#" after "=" as a YAML comment
            raise ConfigurationError(
                f"NumericAnswer.marker and .end_marker must be text, got {marker!r} and {end_marker!r} (empty: none).\n"
                "The command line takes one that starts with # for a comment: give it in a YAML file."
            )
        if not (absolute_tolerance >= 0 and relative_tolerance >= 0):
            raise ConfigurationError(
                "NumericAnswer.absolute_tolerance and NumericAnswer.relative_tolerance must be >= 0, "
                f"got {absolute_tolerance} and {relative_tolerance}."
            )
        self.column = column
        self.marker = marker
        self.end_marker = end_marker
        self.absolute_tolerance = absolute_tolerance
        self.relative_tolerance = relative_tolerance
        self.correct = correct
        self.incorrect = incorrect

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Score]:
        """`correct` or `incorrect` for each completion."""
        return [self._score(*pair) for pair in zip(prompts, completions, strict=True)]

    def answer(self, completion: Completion) -> str | None:
        """The number as a reduced fraction, so that 3.5 and 7/2 are one vote."""
        number = self._extract(completion.text)
        return None if number is None else str(number)

    def _score(self, prompt: Prompt, completion: Completion) -> Score:
        value = self.read_column(prompt, self.column)
        if value is None:
            return None
        expected = last_number(str(value))
        if expected is None:
            raise ConfigurationError(
                f"{self} needs a number in the column {self.column!r}, but row {prompt.index} of the data has "
                f"{str(value)[:200]!r}."
            )
        number = self._extract(completion.text)
        return self.correct if number is not None and self._is_close(number, expected) else self.incorrect

    def _extract(self, text: str) -> Fraction | None:
        span = text if not self.marker else after_marker(text, self.marker, self.end_marker)
        return last_number(span or "")

    def _is_close(self, number: Fraction, expected: Fraction) -> bool:
        tolerance = max(Fraction(self.absolute_tolerance), Fraction(self.relative_tolerance) * abs(expected))
        return abs(number - expected) <= tolerance

"""Reward: the answer is the expected one, letter by letter."""

from collections.abc import Sequence

from grpo_lightning.rewards import RewardCallback
from grpo_lightning.rewards.parsing import after_marker, normalise
from grpo_lightning.types import Completion, ConfigurationError, Prompt, Score


class ExactAnswer(RewardCallback):
    """1 if the completion's answer equals the row's, else 0.

    ``r = correct if extract(completion) == extract(row[column]) else incorrect``

    `extract` takes what follows the last `marker` (to `end_marker`, or to the end of the line) without surrounding
    whitespace, or the whole text where `marker` is empty. A row's value without the marker is taken whole. A
    completion without the marker, or with nothing after it, is incorrect. A row whose value is null gives None.

    Args:
        column: The column with the expected answer.
        marker: What announces the answer, for instance ``#``, which finds GSM8K's ``####`` too, or ``<answer>``; empty
            for the whole completion.
        end_marker: What ends it, for instance ``</answer>``; empty for the end of the line.
        normalise: Compare without regard to case, spacing and a full stop at the end.
        correct: The score of a right answer.
        incorrect: The score of any other.
        name: The reward's name.
        weight: Factor of this reward in a completion's total.

    Raises:
        ConfigurationError: A marker is null.
    """

    def __init__(
        self,
        column: str = "answer",
        marker: str = "#",
        end_marker: str = "",
        normalise: bool = False,
        correct: float = 1.0,
        incorrect: float = 0.0,
        name: str = "exact_answer",
        weight: float = 1.0,
    ) -> None:
        super().__init__(name, weight)
        if marker is None or end_marker is None:  # jsonargparse reads "#" after "=" as a YAML comment
            raise ConfigurationError(
                f"ExactAnswer.marker and .end_marker must be text, got {marker!r} and {end_marker!r} (empty: none).\n"
                "The command line takes one that starts with # for a comment: give it in a YAML file."
            )
        self.column = column
        self.marker = marker
        self.end_marker = end_marker
        self.normalise = normalise
        self.correct = correct
        self.incorrect = incorrect

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Score]:
        """`correct` or `incorrect` for each completion."""
        return [self._score(*pair) for pair in zip(prompts, completions, strict=True)]

    def answer(self, completion: Completion) -> str | None:
        """The extracted answer."""
        return self._extract(completion.text)

    def _score(self, prompt: Prompt, completion: Completion) -> Score:
        value = self.read_column(prompt, self.column)
        if value is None:
            return None
        text = str(value)
        expected = self._extract(text) or (normalise(text) if self.normalise else text.strip())
        return self.correct if self.answer(completion) == expected else self.incorrect

    def _extract(self, text: str) -> str | None:
        found = text.strip() if not self.marker else after_marker(text, self.marker, self.end_marker)
        return (normalise(found) if found and self.normalise else found) or None

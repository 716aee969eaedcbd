"""Reward: the score that a reasoning-gym task's own verifier gives."""

import importlib.util
import re
from collections.abc import Sequence
from typing import Any, Literal

from grpo_lightning.data import reasoning_gym_verification
from grpo_lightning.rewards import RewardCallback
from grpo_lightning.rewards.isolated_scoring import IsolatedScoring
from grpo_lightning.rewards.isolation import FunctionSource
from grpo_lightning.types import Completion, ConfigurationError, Prompt, Score

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ENTRY = ("question", "answer", "metadata")


class ReasoningGymScore(RewardCallback):
    """The verifier's score, in [0, 1], of the text between the answer tags, or of the whole completion without them.

    It reads the columns that the data set `ReasoningGym` writes, and nothing else. An answer that a verifier cannot
    read is worth 0. Verifiers run in processes of their own with a deadline, because some of them evaluate the answer
    as Python (``n_queens``, ``binary_matrix``). That is no sandbox: they run with the user's rights.
    Source: https://github.com/open-thought/reasoning-gym; installed with ``grpo_lightning[reasoning]``.

    Args:
        timeout_seconds: Longest time for one verdict, > 0.
        on_timeout: What a completion is worth whose verdict took longer. ``exclude``: it is a failure, and takes no
            part in the update. A number: that score.
        num_workers: How many processes verify.
        name: The reward's name.
        weight: Factor of this reward in a completion's total.

    Raises:
        ConfigurationError: reasoning-gym is not installed, or a setting is out of its range.
    """

    def __init__(
        self,
        timeout_seconds: float = 10.0,
        on_timeout: Literal["exclude"] | float = "exclude",
        num_workers: int = 2,
        name: str = "reasoning_gym",
        weight: float = 1.0,
    ) -> None:
        super().__init__(name, weight)
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ConfigurationError("ReasoningGymScore needs reasoning-gym: pip install 'grpo_lightning[reasoning]'")
        # A name that cannot be imported, so that the worker loads the file without the package around it.
        source = FunctionSource("_reasoning_gym_verification", reasoning_gym_verification.__file__, "verify_answer")
        self._isolated = IsolatedScoring(
            source, timeout_seconds=timeout_seconds, on_timeout=on_timeout, num_workers=num_workers
        )

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Score]:
        """Ask each task's verifier."""
        calls = [self._call(*pair) for pair in zip(prompts, completions, strict=True)]
        return self._isolated.score_each(self, calls)

    def answer(self, completion: Completion) -> str | None:
        """The last answer between tags, or the whole text."""
        found = _ANSWER.findall(completion.text)
        return (found[-1] if found else completion.text).strip() or None

    def close(self) -> None:
        """End the processes."""
        self._isolated.close()

    def _call(self, prompt: Prompt, completion: Completion) -> dict[str, Any]:
        return {
            "entry": {name: self.read_column(prompt, name) for name in _ENTRY},
            "task": self.read_column(prompt, "task"),
            "task_config": self.read_column(prompt, "task_config"),
            "answer": self.answer(completion),
        }

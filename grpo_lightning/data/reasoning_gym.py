"""Prompts from any generator of reasoning-gym."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from grpo_lightning.data.encoding import PlacedRow, Row, Split
from grpo_lightning.data.module import PromptDataModule, require
from grpo_lightning.types import ConfigurationError

TRIES_PER_TASK = 4
"""How many questions are generated, at most, for each different one that is wanted."""


class ReasoningGym(PromptDataModule):
    """Tasks of one of reasoning-gym's generators, to be scored by `ReasoningGymScore`. Needs the extra ``reasoning``.

    All splits come from one sequence of questions, of which each is kept once, so the splits do not overlap. A row
    carries what the task's own verifier needs: the entry's ``question``, ``answer`` and ``metadata``, and ``task`` and
    ``task_config``. Source: https://github.com/open-thought/reasoning-gym.

    Args:
        task: The generator's name, for instance ``chain_sum``.
        task_config: Its own settings, without ``seed`` and ``size``.
        num_train: Training tasks.
        num_validation: Held-out tasks for `validate`.
        num_test: Held-out tasks for `test`.
        **kwargs: The settings of `PromptDataModule`, without `prompt_column`.

    Raises:
        ConfigurationError: reasoning-gym is not installed, has no such task, or the task refuses its settings.
    """

    def __init__(
        self,
        task: str,
        task_config: dict[str, Any] | None = None,
        num_train: int = 10_000,
        num_validation: int = 256,
        num_test: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # The held-out tasks come first in the sequence: more training tasks leave them as they are.
        self.sizes: dict[Split, int] = {"validation": num_validation, "test": num_test, "train": num_train}
        for split, size in self.sizes.items():
            require(size >= 0, f"num_{split}", ">= 0", size)
        self.task, self.task_config = task, dict(task_config or {})
        self._generator = self._make_generator()
        self._entries: list[PlacedRow] | None = None

    def rows(self, split: Split) -> Sequence[Row]:
        """Question, answer and what the task's own verifier needs."""
        if self._entries is None:
            self._entries = self._distinct(self._generator)
        order = list(self.sizes)
        first = sum(self.sizes[earlier] for earlier in order[: order.index(split)])
        return self._entries[first : first + self.sizes[split]]

    def _make_generator(self) -> Iterable[dict[str, Any]]:
        reasoning_gym, tasks = _reasoning_gym()
        if self.task not in tasks:
            near = difflib.get_close_matches(self.task, tasks, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(sorted(tasks)[:5])}, ..."
            raise ConfigurationError(f"data.task: reasoning-gym has no task {self.task!r}; {hint}")
        reserved = {"seed", "size"} & set(self.task_config)
        require(not reserved, "task_config", "without 'seed' and 'size', which follow from data", sorted(reserved))
        size = max(1, TRIES_PER_TASK * sum(self.sizes.values()))
        try:
            generator: Iterable[dict[str, Any]] = reasoning_gym.create_dataset(
                self.task, seed=self.seed, size=size, **self.task_config
            )
        except (TypeError, AssertionError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigurationError(f"data.task_config: reasoning-gym's {self.task} refuses it: {reason}") from error
        return generator

    def _distinct(self, generator: Iterable[dict[str, Any]]) -> list[PlacedRow]:
        """As many different questions as the splits want together."""
        wanted = sum(self.sizes.values())
        distinct: dict[str, PlacedRow] = {}
        for entry in generator:
            if len(distinct) == wanted:
                break
            question = entry["question"]
            if question not in distinct:
                columns = {**entry, "prompt": question, "task": self.task, "task_config": self.task_config}
                distinct[question] = PlacedRow(columns, place=f"task {len(distinct)} of {self.task}")
        if len(distinct) < wanted:
            raise ConfigurationError(
                f"data: {self.task} made only {len(distinct)} different questions of the {wanted} asked for.\n"
                "Lower data.num_train, or raise the level in data.task_config."
            )
        return list(distinct.values())


def _reasoning_gym() -> tuple[Any, list[str]]:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ConfigurationError("ReasoningGym needs reasoning-gym: pip install 'grpo_lightning[reasoning]'") from error
    return reasoning_gym, list(DATASETS)

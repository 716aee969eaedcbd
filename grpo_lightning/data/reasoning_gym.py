"""Prompts from any generator of reasoning-gym."""

import difflib
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

from grpo_lightning.data.module import PromptDataModule, Row, Split
from grpo_lightning.types import ConfigurationError


class ReasoningGym(PromptDataModule):
    """Tasks of one of reasoning-gym's generators, to be scored by `ReasoningGymScore`. Needs the extra ``reasoning``.

    A question that the generator makes twice is kept once, so the splits do not overlap.

    Args:
        task: The generator's name, for instance ``chain_sum``.
        task_config: Its own settings.
        num_train: Training tasks.
        num_validation: Held-out tasks.
        system_prompt: Makes every prompt a conversation that begins with this system message.
        use_chat_template: Makes every prompt a conversation of one user message.
        max_prompt_tokens: Longest prompt in tokens; None for no limit.
        on_long_prompt: Whether a longer prompt is an error, or is dropped and counted.
        seed: Of the tasks.
        evaluation_batch_size: Held-out prompts completed at once, over all ranks.
    """

    def __init__(
        self,
        task: str,
        task_config: dict[str, Any] | None = None,
        num_train: int = 10_000,
        num_validation: int = 256,
        system_prompt: str | None = None,
        use_chat_template: bool = False,
        max_prompt_tokens: int | None = None,
        on_long_prompt: Literal["error", "drop"] = "error",
        seed: int = 0,
        evaluation_batch_size: int = 256,
    ) -> None:
        super().__init__(
            seed=seed,
            prompt_column="question",
            system_prompt=system_prompt,
            use_chat_template=use_chat_template,
            max_prompt_tokens=max_prompt_tokens,
            on_long_prompt=on_long_prompt,
            evaluation_batch_size=evaluation_batch_size,
        )
        self.task, self.task_config = task, task_config or {}
        self.sizes = {"validation": num_validation, "train": num_train}

    def rows(self, split: Split) -> Sequence[Row]:
        """Question, answer and what the task's own verifier needs."""
        held_out = self.sizes["validation"]
        if split == "test":
            return []
        return self._entries[:held_out] if split == "validation" else self._entries[held_out:]

    @cached_property
    def _entries(self) -> list[dict[str, Any]]:
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise ConfigurationError("data: needs reasoning-gym: pip install 'grpo_lightning[reasoning]'.") from error
        if self.task not in DATASETS:
            near = difflib.get_close_matches(self.task, DATASETS, n=3)
            raise ConfigurationError(
                f"data.task: reasoning-gym has no task {self.task!r}" + (f"; is it one of {near}?" if near else ".")
            )
        wanted = sum(self.sizes.values())
        try:
            generator = reasoning_gym.create_dataset(self.task, seed=self.seed, size=2 * wanted, **self.task_config)
        except (TypeError, AssertionError, ValueError) as error:
            raise ConfigurationError(f"data.task_config: reasoning-gym's {self.task} refuses it: {error}") from error
        distinct: dict[str, dict[str, Any]] = {}
        for entry in generator:
            distinct.setdefault(entry["question"], {**entry, "task": self.task})
            if len(distinct) == wanted:
                return list(distinct.values())
        raise ConfigurationError(
            f"data: {self.task} makes only {len(distinct)} different questions of the {wanted} asked for. Lower "
            "data.num_train, or raise the level in data.task_config."
        )

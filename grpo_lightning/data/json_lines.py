"""Prompts from files of JSON lines."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from grpo_lightning.data.columns import extracted, split_off
from grpo_lightning.data.module import PromptDataModule, Row, Split
from grpo_lightning.types import ConfigurationError


class JSONLines(PromptDataModule):
    """One JSON object per line; its keys are the columns.

    Args:
        train_path: The training prompts.
        validation_path: The validation prompts; None splits `validation_size` rows off the training file.
        test_path: The test prompts; None for none.
        prompt_column: The column that holds the prompt: a text, or a list of messages.
        demonstration_column: The column that holds a worked solution, for the cold start.
        answer_column: The column that `answer_pattern` is applied to.
        answer_pattern: A regular expression with one group, which is put in the answer's place: ``#### (.+)`` for
            GSM8K.
        validation_size: Rows split off where there is no validation file.
        system_prompt: Makes every text prompt a conversation that begins with this system message.
        use_chat_template: Makes every text prompt a conversation of one user message.
        max_prompt_tokens: Longest prompt in tokens; None for no limit.
        on_long_prompt: Whether a longer prompt is an error, or is dropped and counted.
        seed: Of the rows that are split off.
        evaluation_batch_size: Held-out prompts completed at once, over all ranks.
    """

    def __init__(
        self,
        train_path: str,
        validation_path: str | None = None,
        test_path: str | None = None,
        prompt_column: str = "prompt",
        demonstration_column: str | None = None,
        answer_column: str = "answer",
        answer_pattern: str | None = None,
        validation_size: int = 0,
        system_prompt: str | None = None,
        use_chat_template: bool = False,
        max_prompt_tokens: int | None = None,
        on_long_prompt: Literal["error", "drop"] = "error",
        seed: int = 0,
        evaluation_batch_size: int = 256,
    ) -> None:
        super().__init__(
            seed=seed,
            prompt_column=prompt_column,
            system_prompt=system_prompt,
            use_chat_template=use_chat_template,
            max_prompt_tokens=max_prompt_tokens,
            on_long_prompt=on_long_prompt,
            evaluation_batch_size=evaluation_batch_size,
        )
        self.paths = {"train": train_path, "validation": validation_path, "test": test_path}
        self.demonstration_column = demonstration_column
        self.answer_column, self.answer_pattern = answer_column, answer_pattern
        self.validation_size = validation_size

    def rows(self, split: Split) -> Sequence[Row]:
        """The rows of a split's file."""
        path = self.paths[split]
        if split != "test" and self.paths["validation"] is None:
            train, validation = split_off(self._read("train"), self.validation_size, self.seed)
            return train if split == "train" else validation
        return [] if path is None else self._read(split)

    def demonstration_rows(self) -> Sequence[Row]:
        """Training rows with their worked solutions."""
        if self.demonstration_column is None:
            return super().demonstration_rows()
        column = self.demonstration_column
        rows = self.rows("train")
        missing = next((i for i, row in enumerate(rows) if column not in row), None)
        if missing is not None:
            raise ConfigurationError(f"data.demonstration_column: row {missing} has no column {column!r}.")
        return [{**row, "demonstration": row[column]} for row in rows]

    def _read(self, split: Split) -> list[dict[str, Any]]:
        key, path = f"data.{split}_path", Path(str(self.paths[split])).expanduser()
        if not path.is_file():
            raise ConfigurationError(f"{key}: the file {str(path)!r} does not exist.")
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [self._row(f"{path}:{n}", line) for n, line in enumerate(lines, start=1) if line.strip()]
        if not rows:
            raise ConfigurationError(f"{key}: the file {str(path)!r} is empty.")
        return rows

    def _row(self, where: str, line: str) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"{where} is not JSON: {error.msg} (column {error.colno}).") from error
        if not isinstance(row, dict):
            raise ConfigurationError(f"{where} must be a JSON object, got {type(row).__name__}.")
        if self.prompt_column not in row:
            raise ConfigurationError(
                f"{where} has no column {self.prompt_column!r} (data.prompt_column); it has {sorted(row)}."
            )
        return extracted(row, self.answer_column, self.answer_pattern, where)

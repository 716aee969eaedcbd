"""Prompts from a data set of the Hugging Face hub, or from a folder that `datasets` saved."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from grpo_lightning.data.columns import extracted, split_off
from grpo_lightning.data.module import PromptDataModule, Row, Split
from grpo_lightning.types import ConfigurationError


class HuggingFaceDataset(PromptDataModule):
    """A data set that `datasets` loads. Needs the extra ``datasets``.

    Args:
        path: A hub id (``openai/gsm8k``), or a folder: one that `save_to_disk` wrote, or one with data files.
        configuration: The data set's configuration (``main``); None for its default.
        train_split: Name of the training split.
        validation_split: Name of the held-out split; None splits `validation_size` rows off the training split.
        revision: Branch, tag or commit.
        prompt_column: The column that holds the prompt: a text, or a list of messages.
        answer_column: The column that `answer_pattern` is applied to.
        answer_pattern: A regular expression with one group, which is put in the answer's place.
        validation_size: Rows split off where there is no held-out split.
        system_prompt: Makes every text prompt a conversation that begins with this system message.
        use_chat_template: Makes every text prompt a conversation of one user message.
        max_prompt_tokens: Longest prompt in tokens; None for no limit.
        on_long_prompt: Whether a longer prompt is an error, or is dropped and counted.
        seed: Of the rows that are split off.
        evaluation_batch_size: Held-out prompts completed at once, over all ranks.
    """

    def __init__(
        self,
        path: str,
        configuration: str | None = None,
        train_split: str = "train",
        validation_split: str | None = None,
        revision: str | None = None,
        prompt_column: str = "prompt",
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
        self.path, self.configuration, self.revision = path, configuration, revision
        self.train_split, self.validation_split = train_split, validation_split
        self.answer_column, self.answer_pattern = answer_column, answer_pattern
        self.validation_size = validation_size

    def rows(self, split: Split) -> Sequence[Row]:
        """The rows of a split."""
        if split == "test":
            return []
        if self.validation_split is None:
            train, validation = split_off(self._load(self.train_split), self.validation_size, self.seed)
            return train if split == "train" else validation
        return self._load(self.train_split if split == "train" else self.validation_split)

    def _load(self, name: str) -> list[dict[str, Any]]:
        try:
            import datasets
        except ImportError as error:
            raise ConfigurationError("data: needs `datasets`: pip install 'grpo_lightning[datasets]'.") from error
        folder = Path(self.path).expanduser()
        try:
            if (folder / "dataset_dict.json").is_file():
                loaded = datasets.load_from_disk(str(folder))[name]
            else:
                loaded = datasets.load_dataset(self.path, self.configuration, split=name, revision=self.revision)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise ConfigurationError(
                f"data.path: split {name!r} of {self.path!r} cannot be loaded: {reason}"
            ) from error
        if self.prompt_column not in loaded.column_names:
            raise ConfigurationError(
                f"data.prompt_column: {self.path!r} has no column {self.prompt_column!r}; it has {loaded.column_names}."
            )
        return [
            extracted(dict(row), self.answer_column, self.answer_pattern, f"{self.path} {name} row {i}")
            for i, row in enumerate(loaded)
        ]

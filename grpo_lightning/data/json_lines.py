"""Prompts from files of JSON lines."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_lightning.data.columns import ColumnDataModule
from grpo_lightning.data.encoding import PlacedRow, Split
from grpo_lightning.types import ConfigurationError


class JSONLines(ColumnDataModule):
    """One JSON object per line; its keys are the columns. Blank lines are passed over.

    Args:
        train_path: The training prompts.
        validation_path: The validation prompts; null splits `validation_size` rows off the training file.
        test_path: The test prompts; null for none.
        **kwargs: The settings of `ColumnDataModule` and of `PromptDataModule`.

    Raises:
        ConfigurationError: A setting is out of its range.
    """

    def __init__(
        self, train_path: str, validation_path: str | None = None, test_path: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.paths: dict[Split, str | None] = {
            "train": train_path,
            "validation": validation_path,
            "test": test_path,
        }

    def load(self, split: Split) -> Sequence[PlacedRow] | None:
        """The rows of a split's file.

        Raises:
            ConfigurationError: The file is missing or empty, is no UTF-8 text, or a line of it is no JSON object.
        """
        if self.paths[split] is None:
            return None
        key, path = f"data.{split}_path", Path(str(self.paths[split])).expanduser()
        if not path.is_file():
            missing = "is a folder" if path.is_dir() else "does not exist"
            raise ConfigurationError(f"{key}: the file {str(path)!r} {missing}.")
        try:
            # Read by the file's own lines: str.splitlines would also cut at U+2028, which JSON allows in a string.
            with path.open(encoding="utf-8-sig") as file:
                rows = [_row(f"{path}:{n}", line) for n, line in enumerate(file, start=1) if line.strip()]
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"{key}: the file {str(path)!r} is no UTF-8 text: {error.reason}.") from error
        if not rows:
            raise ConfigurationError(f"{key}: the file {str(path)!r} is empty.")
        return rows


def _row(place: str, line: str) -> PlacedRow:
    try:
        row = json.loads(line.rstrip())  # a line that breaks off is wrong where it ends, not on the next one
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"{place} is not JSON: {error.msg} (column {error.colno}).") from error
    if not isinstance(row, dict):
        raise ConfigurationError(f"{place} must be a JSON object, got {line.strip()[:80]!r}.")
    return PlacedRow(row, place=place)

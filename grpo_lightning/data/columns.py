"""What files and hub data sets share: columns by other names, answers within a column, rows split off."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from grpo_lightning.data.encoding import PlacedRow, Row, Split
from grpo_lightning.data.module import PromptDataModule, require
from grpo_lightning.functional.random import permutation
from grpo_lightning.types import ConfigurationError, Stream


class ColumnDataModule(PromptDataModule, ABC):
    """Rows that stand somewhere, brought into the form that rewards expect. Subclass it, and implement `load`.

    Args:
        columns: New columns, by the name of the column that each copies: ``{answer: solution}`` for rewards that read
            ``answer`` where the data say ``solution``. The column ``demonstration`` is what the cold start imitates.
        answer_pattern: A regular expression with one group, which replaces the column ``answer`` by what it finds:
            ``#### (.+)`` for GSM8K.
        validation_size: Rows that the seed splits off the training rows, where there are no validation rows.
        **kwargs: The settings of `PromptDataModule`.

    Raises:
        ConfigurationError: A setting is out of its range.
    """

    def __init__(
        self,
        columns: dict[str, str] | None = None,
        answer_pattern: str | None = None,
        validation_size: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        require(validation_size >= 0, "validation_size", ">= 0", validation_size)
        self.columns = dict(columns or {})
        if {"prompt", self.prompt_column} & set(self.columns):
            raise ConfigurationError("data.columns: the prompt's column is named by data.prompt_column.")
        self.answer_pattern = _with_one_group(answer_pattern)
        self.validation_size = validation_size
        self._loaded: dict[Split, list[PlacedRow] | None] = {}

    @abstractmethod
    def load(self, split: Split) -> Sequence[PlacedRow] | None:
        """The rows of a split as they stand; None where the data have no such split."""

    def rows(self, split: Split) -> Sequence[Row]:
        """The rows of a split; without validation rows, those that are split off the training rows."""
        if split == "test" or self._mapped("validation") is not None:
            return self._mapped(split) or []
        train, validation = split_off(self._mapped("train") or [], self.validation_size, self.seed)
        return train if split == "train" else validation

    def demonstration_rows(self) -> Sequence[Row]:
        """The training rows with their worked solutions."""
        rows = self.rows("train")
        if not any("demonstration" in row for row in rows):
            raise ConfigurationError(
                "data: the rows have no column 'demonstration' to learn from. "
                "Name the column that holds them: data.columns: {demonstration: ...}."
            )
        return rows

    def _mapped(self, split: Split) -> list[PlacedRow] | None:
        """What `load` gives, read once, in the form that rewards expect."""
        if split not in self._loaded:
            rows = self.load(split)
            if rows is not None and split == "validation":
                require(self.validation_size == 0, "validation_size", "0 beside validation rows", self.validation_size)
            self._loaded[split] = None if rows is None else [self._mapped_row(row) for row in rows]
        return self._loaded[split]

    def _mapped_row(self, row: PlacedRow) -> PlacedRow:
        """The row with its new columns, and the answer that the pattern finds."""
        require_column(row, self.prompt_column, "data.prompt_column")
        for name, source in self.columns.items():
            require_column(row, source, f"data.columns.{name}")
        mapped = PlacedRow({**row, **{name: row[source] for name, source in self.columns.items()}}, place=row.place)
        if self.answer_pattern is not None:
            require_column(mapped, "answer", "data.answer_pattern")
            mapped["answer"] = _found(self.answer_pattern, str(mapped["answer"]), row.place)
        return mapped


def require_column(row: PlacedRow, column: str, setting: str) -> None:
    """Refuse a row without a column that a setting names.

    Raises:
        ConfigurationError: There is no such column.
    """
    if column not in row:
        raise ConfigurationError(f"{row.place} has no column {column!r} ({setting}); it has: {', '.join(row)}.")


def split_off(rows: Sequence[PlacedRow], size: int, seed: int) -> tuple[list[PlacedRow], list[PlacedRow]]:
    """Split rows for validation off the training rows; which ones, the seed alone decides.

    Args:
        rows: All rows.
        size: How many to hold out.
        seed: Of the choice.

    Returns:
        The rows to train on and the rows held out, each in the order of `rows`.

    Raises:
        ConfigurationError: Nothing would be left to train on.
    """
    require(size < len(rows), "validation_size", f"less than the {len(rows)} training rows", size)
    held_out = set(permutation(len(rows), seed=seed, stream=Stream.DATA, epoch=0)[:size].tolist())
    train = [row for i, row in enumerate(rows) if i not in held_out]
    return train, [rows[i] for i in sorted(held_out)]


def _with_one_group(pattern: str | None) -> "re.Pattern[str] | None":
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigurationError(f"data.answer_pattern {pattern!r} is no regular expression: {error}.") from error
    require(compiled.groups == 1, "answer_pattern", "a regular expression with one group", repr(pattern))
    return compiled


def _found(pattern: "re.Pattern[str]", text: str, place: str) -> str:
    match = pattern.search(text)
    if match is None or match[1] is None:
        raise ConfigurationError(
            f"{place}: data.answer_pattern {pattern.pattern!r} finds nothing in the answer {text[-80:]!r}."
        )
    return match[1].strip()

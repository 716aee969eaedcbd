"""What files and hub data sets share: final answers within a column, and rows split off for validation."""

import re
from collections.abc import Sequence
from typing import Any

from grpo_lightning.functional.random import permutation
from grpo_lightning.types import ConfigurationError, Stream


def extracted(row: dict[str, Any], column: str, pattern: str | None, where: str) -> dict[str, Any]:
    """The row with the pattern's group in the answer's place.

    Args:
        row: A row of the data.
        column: The answer's column.
        pattern: A regular expression with one group; None leaves the row as it is.
        where: The row's place, for errors.

    Example:
        >>> extracted({"answer": "6 + 6 = 12 #### 12"}, "answer", "#### (.+)", "a.jsonl:1")
        {'answer': '12'}
    """
    if pattern is None:
        return row
    if column not in row:
        raise ConfigurationError(f"{where} has no column {column!r} (data.answer_column); it has {sorted(row)}.")
    match = re.search(pattern, str(row[column]))
    if match is None or match.re.groups != 1:
        raise ConfigurationError(
            f"{where}: data.answer_pattern {pattern!r} with one group does not match {row[column]!r}."
        )
    return {**row, column: match[1].strip()}


def split_off(
    rows: Sequence[dict[str, Any]], size: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split rows for validation off the training rows; which ones, the seed alone decides."""
    if size >= len(rows):
        raise ConfigurationError(f"data.validation_size must be less than the {len(rows)} rows, got {size}.")
    held_out = set(permutation(len(rows), seed=seed, stream=Stream.DATA, epoch=0)[:size].tolist())
    train = [row for i, row in enumerate(rows) if i not in held_out]
    return train, [rows[i] for i in sorted(held_out)]

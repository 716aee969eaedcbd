"""A key-value cache whose rows come and go."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from grpo_lightning.rollout.attention import AttentionPattern, Masks
from grpo_lightning.rollout.prefill import PromptStates

SPARE_COLUMNS = 64


class RowCache(Cache):
    """Keys and values of R rows, one buffer per layer, aligned at their ends.

    However long each row is, all write their next token at the same column. A step is then one contiguous slice per
    layer instead of a scatter, and what a row must not see (the columns before its first token) never changes while
    it lives::

        column     0 1 2 3 4 5 6 7
        row 0      . . p p p c c |        p: prompt   c: completion   .: hidden   |: written next
        row 1      . . . . p p c |        views are columns 2 .. 7: the longest live row's

    Rows are appended at the end; the places of rows that leave are filled with the last ones, so that the live rows
    are always the first R of the buffer, and a departure costs one row's copy at most. Where the buffer's columns are
    used up, the live window moves to the front.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.column = 0
        """The column that the next token is written at."""
        self.starts: list[int] = []
        """Each live row's first column."""
        self._first = 0
        self._storage: list[Tensor] = []
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._mask = torch.empty(0, 0)
        self._reserved = 0
        self._num_rows = 0

    def begin(self, *, num_rows: int, longest_prompt: int) -> None:
        """Empty the cache, keeping its memory.

        Args:
            num_rows: Most rows that will be live at once before the next `begin`.
            longest_prompt: Longest prompt, in tokens, that will be appended.
        """
        self.starts, self._keys, self._values, self._num_rows = [], [], [], num_rows
        self._reserved = self.column = self._first = longest_prompt

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the rows' next column in one layer, and return all that the rows may see there."""
        keys = self._keys[layer_idx][: len(self.starts), :, self._first : self.column + 1]
        values = self._values[layer_idx][: len(self.starts), :, self._first : self.column + 1]
        keys[:, :, -1:] = key_states
        values[:, :, -1:] = value_states
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - the same in all layers
        """Columns in view before the next token."""
        return self.column - self._first

    def masks(self, pattern: AttentionPattern) -> Masks:
        """The mask of the next token: 0 where a row may attend, -inf before its first token."""
        mask = self._mask[: len(self.starts), None, None, self._first : self.column + 1]
        width = mask.shape[-1]
        distances = torch.arange(width - 1, -1, -1, device=mask.device)[None] if pattern.window else mask
        return pattern.masks(mask, distances)

    @contextmanager
    def reading(self, model: PreTrainedModel) -> Iterator[dict[str, Any]]:  # noqa: ARG002 - the model's own will do
        """Around a forward: further arguments of it, for an attention that reads more than `update` returns."""
        yield {}

    def append(
        self,
        prompts: PromptStates,
        prompt_of_row: Sequence[int],
        lengths: Sequence[int],
        names: Sequence[int],  # noqa: ARG002 - for caches that hold a prompt once
    ) -> None:
        """Add rows that continue prompts.

        Args:
            prompts: The prompts' states.
            prompt_of_row: Which of them each new row continues.
            lengths: The number of tokens of each new row's prompt.
            names: A number for the prompt of each new row, the same whenever it is the same prompt.
        """
        if not self._keys:
            self._shape_buffers(prompts.keys, prompts.values, width=self.column + SPARE_COLUMNS)
        old, new = len(self.starts), len(self.starts) + len(lengths)
        self.starts += [self.column - length for length in lengths]
        self._first = min(self.starts)
        begin = self.column - prompts.keys[0].shape[2]
        index = torch.tensor(prompt_of_row, device=self._mask.device)
        for buffers, layers in ((self._keys, prompts.keys), (self._values, prompts.values)):
            for buffer, states in zip(buffers, layers, strict=True):
                buffer[old:new, :, begin : self.column] = states.index_select(0, index)
        self._hide(slice(old, new))

    def remove(self, rows: Sequence[int]) -> list[int]:
        """Take rows out.

        Returns:
            For each row that is left, which one it was.
        """
        num_left = len(self.starts) - len(rows)
        leaving = set(rows)
        order = list(range(num_left))
        holes = [row for row in rows if row < num_left]
        movers = [row for row in range(num_left, len(self.starts)) if row not in leaving]
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        self._move(movers, holes)
        self.starts = [self.starts[row] for row in order]
        self._first = min(self.starts, default=self.column)
        return order

    def advance(self) -> None:
        """Go on to the next column."""
        self.column += 1
        width = self._mask.shape[1]
        if self.column < width:
            return
        # The longest prompt must still fit before the next column.
        column = max(self.column - self._first, self._reserved)
        if column + max(SPARE_COLUMNS, column // 4) > width:
            width = column + max(SPARE_COLUMNS, column // 2)
        self._relocate(column=column, width=width)

    def _hide(self, rows: slice) -> None:
        """Write the masks of some rows."""
        starts = torch.tensor(self.starts[rows], dtype=torch.long, device=self._mask.device)[:, None]
        columns = torch.arange(self._mask.shape[1], device=self._mask.device)[None]
        self._mask[rows] = torch.zeros_like(self._mask[rows]).masked_fill_(columns < starts, -torch.inf)

    def _move(self, sources: list[int], targets: list[int]) -> None:
        if not sources:
            return
        source, target = (torch.tensor(rows, device=self._mask.device) for rows in (sources, targets))
        for buffer in (*self._keys, *self._values):
            view = buffer[:, :, self._first : self.column]
            view[target] = view[source]
        self._mask[target] = self._mask[source]

    def _relocate(self, *, column: int, width: int) -> None:
        """Move the live window so that it ends before `column`, in buffers of `width` columns."""
        begin = column - (self.column - self._first)
        buffers = (*self._keys, *self._values)
        windows = [buffer[: len(self.starts), :, self._first : self.column].clone() for buffer in buffers]
        self._shape_buffers([*self._keys], [*self._values], width=width)
        for buffer, window in zip((*self._keys, *self._values), windows, strict=True):
            buffer[: len(self.starts), :, begin:column] = window
        self.starts = [start - self._first + begin for start in self.starts]
        self.column, self._first = column, begin
        self._hide(slice(len(self.starts)))

    def _shape_buffers(self, keys: Sequence[Tensor], values: Sequence[Tensor], *, width: int) -> None:
        """Lay buffers of `width` columns over the storage, for layers with such keys and values.

        Every call of `generate` begins with the same shapes, whatever came before: strides may decide how a product
        is computed, and a resumed run must agree to the last bit with one that was never interrupted.
        """
        likes = (*keys, *values)
        self._storage += [like.new_zeros(0) for like in likes[len(self._storage) :]]
        buffers = []
        for i, like in enumerate(likes):
            shape = (self._num_rows, like.shape[1], width, like.shape[3])
            storage = self._storage[i]
            if storage.numel() < math.prod(shape) or (storage.dtype, storage.device) != (like.dtype, like.device):
                # Zeros, not whatever was there: a hidden NaN would still reach the result, as 0 times NaN.
                storage = self._storage[i] = like.new_zeros(math.prod(shape))
            buffers.append(storage[: math.prod(shape)].view(shape))
        self._keys, self._values = buffers[: len(keys)], buffers[len(keys) :]
        self._mask = likes[0].new_zeros(self._num_rows, width)

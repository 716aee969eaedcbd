"""A key-value cache whose rows come and go."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache


class RowCache(Cache):
    """Keys and values of R rows in one buffer per layer, all writing at the same column.

    The rows are aligned at their ends, whatever their lengths, so that a step writes one contiguous slice; each row's
    mask says where it begins. A row that has finished gives its place to a waiting one, or is taken out.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(layers=[])
        self.capacity = capacity
        self.start = 0
        """First column that any row uses."""
        self.end = 0
        """Column that the next token is written at."""
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write one column and return what the rows may attend to."""
        window = slice(self.start, self.end + 1)
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[:, :, self.end : self.end + 1] = key_states
        values[:, :, self.end : self.end + 1] = value_states
        return keys[:, :, window], values[:, :, window]

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - all layers are alike
        """Columns in use."""
        return self.end - self.start

    def admit(self, layers: list[tuple[Tensor, Tensor]], prompt_of_row: Tensor, rows: Tensor | None) -> None:
        """Put prompts' keys and values before the next column.

        Args:
            layers: Of each layer, keys and values of the distinct prompts, aligned at their ends.
            prompt_of_row: Which prompt each admitted row has.
            rows: Which rows take them; None: these are all the rows there are.
        """
        for layer, pair in enumerate(layers):
            for buffers, prompts in zip((self.keys, self.values), pair, strict=True):
                if rows is None:
                    heads, width = prompts.shape[1], prompts.shape[3]
                    buffers[layer:] = [prompts.new_empty(len(prompt_of_row), heads, self.capacity, width)]
                columns = slice(self.end - prompts.shape[2], self.end)
                target = slice(None) if rows is None else rows
                buffers[layer][target, :, columns] = prompts[prompt_of_row]

    def keep(self, rows: Tensor) -> None:
        """Take out all rows but these."""
        for buffers in (self.keys, self.values):
            for layer, buffer in enumerate(buffers):
                kept = buffer.new_empty(len(rows), *buffer.shape[1:])
                kept[:, :, self.start : self.end] = buffer[:, :, self.start : self.end][rows]
                buffers[layer] = kept

    def move_to_front(self) -> None:
        """Move the window to the first column, to make room at the end."""
        for buffer in (*self.keys, *self.values):
            buffer[:, :, : self.end - self.start] = buffer[:, :, self.start : self.end].clone()
        self.start, self.end = 0, self.end - self.start


def prefill(model: torch.nn.Module, prompts: list[tuple[int, ...]], device: torch.device) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Run prompts through the model once, aligned at their ends.

    Returns:
        Keys and values of each layer, [U, heads, longest, width], and the logits after each prompt, [U, V].
    """
    longest = max(map(len, prompts))
    padding_U = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    input_ids_UL = torch.tensor([(0,) * (longest - len(p)) + tuple(p) for p in prompts], device=device)
    columns_L = torch.arange(longest, device=device)
    is_visible_ULL = (columns_L[None, None] >= padding_U[:, None, None]) & (columns_L[None] <= columns_L[:, None])[None]
    # A state over padding is never read, but attending to nothing would make it NaN: it attends to itself.
    is_visible_ULL = is_visible_ULL | torch.eye(longest, dtype=torch.bool, device=device)[None]
    cache = _PrefillCache()
    output = model(
        input_ids=input_ids_UL,
        attention_mask=additive(is_visible_ULL[:, None], next(model.parameters()).dtype),
        position_ids=(columns_L[None] - padding_U[:, None]).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return cache.pairs, output.logits[:, -1]


def additive(is_visible: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as every attention implementation of transformers takes it: 0 where visible, lowest elsewhere."""
    return torch.zeros(is_visible.shape, dtype=dtype, device=is_visible.device).masked_fill_(
        ~is_visible, torch.finfo(dtype).min
    )


class _PrefillCache(Cache):
    """Keeps what a prefill computed."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - layers come in order
        self.pairs.append((key_states, value_states))
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - the interface's
        return 0

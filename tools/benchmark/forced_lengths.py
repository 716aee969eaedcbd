"""Completions of given lengths from transformers' `generate`."""

from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel


class ForcedLengths(LogitsProcessor):
    """The end of sequence at a given position of each row, and nowhere else.

    Args:
        lengths: Of each completion, the end of sequence included.
        max_length: A completion of this length is cut off instead.
        eos: The token that ends a sequence.
    """

    def __init__(self, lengths: tuple[int, ...], max_length: int, eos: int) -> None:
        self.lengths_B = torch.tensor(lengths)
        self.max_length, self.eos = max_length, eos
        self.prompt_length: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The logits of the next token, changed in place: `generate` has made a copy of them."""
        if self.prompt_length is None:
            self.prompt_length = input_ids.shape[1]
        length = input_ids.shape[1] - self.prompt_length + 1
        scores[:, self.eos] = float("-inf")
        ends_B = (self.lengths_B == length) & (length < self.max_length)
        scores[ends_B] = float("-inf")
        scores[ends_B, self.eos] = 0.0
        return scores


class Generation:
    """The model's own `generate`, with lengths that are forced, and counted.

    Args:
        model: Whose `generate` is replaced.
        max_length: Of a completion.
        eos: The token that ends a sequence.
    """

    def __init__(self, model: PreTrainedModel, max_length: int, eos: int) -> None:
        self._generate, self._max_length, self._eos = model.generate, max_length, eos
        self.lengths: tuple[int, ...] = ()
        """The tokens of each completion drawn last."""
        self.forced: tuple[int, ...] = ()
        """Those that the next ones will have; empty for whatever is drawn."""
        model.generate = self  # type: ignore[assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the model's."""
        forced = [ForcedLengths(self.forced, self._max_length, self._eos)] if self.forced else []
        output: torch.Tensor = self._generate(*args, **kwargs, logits_processor=LogitsProcessorList(forced))
        self.lengths = tuple(completion_lengths(output[:, kwargs["input_ids"].shape[1] :], self._eos).tolist())
        return output


def completion_lengths(token_ids_BT: torch.Tensor, eos: int) -> torch.Tensor:
    """The tokens of each completion up to its first end of sequence, that one included."""
    has_ended_BT = (token_ids_BT == eos).int().cumsum(dim=1).clamp(max=1)
    return token_ids_BT.shape[1] - has_ended_BT.sum(dim=1) + has_ended_BT[:, -1]

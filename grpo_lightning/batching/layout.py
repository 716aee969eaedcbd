"""How completions are laid out for the training forward: the contract."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from grpo_lightning.types import ForwardBatch


class Row(NamedTuple):
    """A completion with its prompt. Rows of one slot have one prompt."""

    slot: int
    prompt_ids: Tensor
    completion_ids: Tensor


class RowLike(Protocol):
    """Whatever has a row's tokens, a sample for one."""

    @property
    def slot(self) -> int:
        """Of the prompt."""

    @property
    def prompt_ids(self) -> Tensor:
        """int64, at least one."""

    @property
    def completion_ids(self) -> Tensor:
        """int64, at least one."""


class Layout(ABC):
    """Lays completions out, and spreads them over forwards of nearly equal cost.

    No layout changes the result: log-probabilities and gradients are those of each sequence by itself.
    """

    needs_segments: ClassVar[bool]
    """Whether the model's attention must follow `ForwardBatch.segments`."""

    @abstractmethod
    def lay_out(self, rows: Sequence[RowLike], device: torch.device) -> ForwardBatch:
        """The batch of one forward; its completions are the rows, in their order.

        Args:
            rows: At least one.
            device: Where the forward runs.
        """

    @abstractmethod
    def bins(self, rows: Sequence[RowLike], num_bins: int) -> list[list[int]]:
        """Spread rows over exactly `num_bins` forwards, the costliest of which is nearly as cheap as can be.

        Returns:
            The indices of each bin's rows; some are empty only where there are fewer rows than bins.
        """

    @abstractmethod
    def pieces(self, rows: Sequence[RowLike], max_tokens: int | None) -> list[list[int]]:
        """Cut one forward into pieces of at most `max_tokens` laid-out tokens, at least one row each.

        Args:
            rows: Of one forward.
            max_tokens: None for one piece.

        Returns:
            The indices of each piece's rows.
        """

"""The padded layout: one row per completion, right-padded. The readable oracle of the other layouts."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from grpo_lightning.batching.bins import balanced_bins, chunks
from grpo_lightning.batching.layout import Layout, RowLike
from grpo_lightning.types import ForwardBatch


def padded(prompts: Sequence[Tensor], completions: Sequence[Tensor], device: torch.device) -> ForwardBatch:
    """Lay out completions as right-padded rows of prompt and completion.

    Neither attention mask nor position ids are needed: under causal attention a real token never sees the padding to
    its right, and no state over padding is ever read.

    Args:
        prompts: int64 tokens of each completion's prompt, at least one each.
        completions: int64 tokens of each completion, at least one each.
        device: Where the forward runs.

    Example: prompt (5, 9) and completion (7, 1) become the row ``[5, 9, 7, 1]``; the states at 1 and 2 predict them.
    """
    rows = [torch.cat(pair) for pair in zip(prompts, completions, strict=True)]
    input_ids_RL = pad_sequence(rows, batch_first=True)
    lengths_B = torch.tensor([len(completion) for completion in completions])
    starts_B = torch.tensor([len(prompt) for prompt in prompts]) - 1
    rows_N = torch.repeat_interleave(torch.arange(len(rows)), lengths_B)
    columns_N = torch.arange(int(lengths_B.sum())) - torch.repeat_interleave(lengths_B.cumsum(0) - lengths_B, lengths_B)
    positions_N = rows_N * input_ids_RL.shape[1] + starts_B[rows_N] + columns_N
    return ForwardBatch(
        input_ids_RL=input_ids_RL.to(device),
        positions_N=positions_N.to(device),
        targets_N=torch.cat(list(completions)).to(device),
        rows_N=rows_N.to(device),
        columns_N=columns_N.to(device),
        num_completions=len(rows),
        max_completion_tokens=int(lengths_B.max()),
    )


class Padded(Layout):
    """Right-padded rows of prompt and completion, a row each. Works for every model."""

    needs_segments: ClassVar[bool] = False

    def lay_out(self, rows: Sequence[RowLike], device: torch.device) -> ForwardBatch:
        """As wide as the longest row."""
        return padded([r.prompt_ids for r in rows], [r.completion_ids for r in rows], device)

    def bins(self, rows: Sequence[RowLike], num_bins: int) -> list[list[int]]:
        """Rows of similar lengths together."""
        return balanced_bins(_lengths(rows), num_bins)

    def pieces(self, rows: Sequence[RowLike], max_tokens: int | None) -> list[list[int]]:
        """Tokens count with their padding."""
        return chunks(range(len(rows)), _lengths(rows), max_tokens)


def usable_layout(layout: Layout, follows_segments: Callable[[], bool]) -> Layout:
    """The layout, or the padded one where the model's attention cannot follow it, which is said."""
    if not layout.needs_segments or follows_segments():
        return layout
    rank_zero_warn(
        f"model.layout: the policy's attention does not follow {type(layout).__name__}: its forwards are padded."
    )
    return Padded()


def _lengths(rows: Sequence[RowLike]) -> list[int]:
    return [len(r.prompt_ids) + len(r.completion_ids) for r in rows]

"""The flat layouts: one row of all tokens, no padding, and no attention across sequences."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from grpo_lightning.batching.groups import Group, balanced_groups, grouped_pieces
from grpo_lightning.batching.layout import Layout, RowLike
from grpo_lightning.functional.segments import Segments, Span, Tree
from grpo_lightning.types import ForwardBatch


class Packed(Layout):
    """Every sequence by itself in one flat row: no padding, but a prompt is computed for each of its completions."""

    needs_segments: ClassVar[bool] = True

    def lay_out(self, rows: Sequence[RowLike], device: torch.device) -> ForwardBatch:
        """Sequence after sequence."""
        return _flat(rows, _groups(rows, shared=False), device)

    def bins(self, rows: Sequence[RowLike], num_bins: int) -> list[list[int]]:
        """Sequences one by one."""
        return balanced_groups(_groups(rows, shared=False), num_bins)

    def pieces(self, rows: Sequence[RowLike], max_tokens: int | None) -> list[list[int]]:
        """Every sequence counts all its tokens."""
        return grouped_pieces(_groups(rows, shared=False), max_tokens)


class SharedPrefix(Layout):
    """Each distinct prompt once in one flat row, forward and backward; its completions continue it.

    The prompt's gradient adds up over its completions inside the attention, which is exact.

    Example: the completions (7, 1) and (8,) of the prompt (5, 9) become the row ``[5, 9, 7]``: the state at 1 predicts
    7 and 8, the one at 2 predicts 1. What comes last predicts nothing, and is left out.
    """

    needs_segments: ClassVar[bool] = True

    def lay_out(self, rows: Sequence[RowLike], device: torch.device) -> ForwardBatch:
        """Prompt after prompt, each followed by its completions."""
        return _flat(rows, _groups(rows, shared=True), device)

    def bins(self, rows: Sequence[RowLike], num_bins: int) -> list[list[int]]:
        """Groups stay together unless they are too large for a bin."""
        return balanced_groups(_groups(rows, shared=True), num_bins)

    def pieces(self, rows: Sequence[RowLike], max_tokens: int | None) -> list[list[int]]:
        """A prompt counts once in every piece that has completions of it."""
        return grouped_pieces(_groups(rows, shared=True), max_tokens)


def _groups(rows: Sequence[RowLike], *, shared: bool) -> list[Group]:
    """The rows by the prompt that they share, or each by itself."""
    members: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        members.setdefault(row.slot if shared else i, []).append(i)
    return [
        Group(len(rows[of[0]].prompt_ids), tuple(of), tuple(len(rows[i].completion_ids) for i in of))
        for of in members.values()
    ]


def _flat(rows: Sequence[RowLike], groups: Sequence[Group], device: torch.device) -> ForwardBatch:
    """Lay groups one after another: prompt, then each completion but for its last token."""
    parts, trees, offset = [], list[Tree](), 0
    prompt_ends, tail_starts, prompt_lengths = ([0] * len(rows) for _ in range(3))
    for group in groups:
        parts += [rows[group.members[0]].prompt_ids, *(rows[i].completion_ids[:-1] for i in group.members)]
        start, offset = offset, offset + group.prompt
        tails = []
        for i, length in zip(group.members, group.completions, strict=True):
            prompt_ends[i], tail_starts[i], prompt_lengths[i] = start + group.prompt - 1, offset, group.prompt
            tails.append(Span(offset, length - 1))
            offset += length - 1
        # A completion that has its prompt to itself makes one plain sequence with it.
        is_alone = len(tails) == 1
        trees.append(Tree(Span(start, offset - start)) if is_alone else Tree(Span(start, group.prompt), tuple(tails)))
    lengths_B = torch.tensor([len(r.completion_ids) for r in rows])
    rows_N = torch.repeat_interleave(torch.arange(len(rows)), lengths_B)
    columns_N = torch.arange(len(rows_N)) - torch.repeat_interleave(lengths_B.cumsum(0) - lengths_B, lengths_B)
    is_first_N = columns_N == 0
    positions_N = torch.tensor(tail_starts)[rows_N] + columns_N - 1
    positions_N = torch.where(is_first_N, torch.tensor(prompt_ends)[rows_N], positions_N)
    position_ids_L = _position_ids(groups, offset, positions_N, torch.tensor(prompt_lengths)[rows_N] + columns_N - 1)
    return ForwardBatch(
        input_ids_RL=torch.cat(parts)[None].to(device),
        positions_N=positions_N.to(device),
        targets_N=torch.cat([r.completion_ids for r in rows]).to(device),
        rows_N=rows_N.to(device),
        columns_N=columns_N.to(device),
        num_completions=len(rows),
        max_completion_tokens=int(lengths_B.max()),
        position_ids_RL=position_ids_L[None].to(device),
        segments=Segments.of(trees, device),
    )


def _position_ids(groups: Sequence[Group], num_tokens: int, positions_N: Tensor, of_positions_N: Tensor) -> Tensor:
    """Of each flat token in its sequence: prompts count from 0, and completions where their prompt ends."""
    position_ids_L = torch.empty(num_tokens, dtype=torch.long)
    offset = 0
    for group in groups:
        torch.arange(group.prompt, out=position_ids_L[offset : offset + group.prompt])
        offset += group.prompt + sum(group.completions) - len(group.completions)
    position_ids_L[positions_N] = of_positions_N
    return position_ids_L

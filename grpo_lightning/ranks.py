"""What the ranks of a run tell each other: sums, the rows of small tables, and groups of completions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def sum_over_ranks(values: Sequence[float], *, num_ranks: int, device: torch.device) -> list[float]:
    """Each value summed over all ranks, in fp64. A collective: every rank calls it, with equally many values.

    Args:
        values: Of this rank.
        num_ranks: Of the run; one needs no process group.
        device: One that the process group can reduce on.
    """
    if num_ranks == 1:
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return [float(value) for value in total.tolist()]


def largest_over_ranks(values: Sequence[int], *, num_ranks: int, device: torch.device) -> list[int]:
    """The largest of each value over all ranks. A collective: every rank calls it, with equally many values.

    Args:
        values: Of this rank.
        num_ranks: Of the run; one needs no process group.
        device: One that the process group can reduce on.
    """
    if num_ranks == 1:
        return list(values)
    largest = torch.tensor(values, device=device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return [int(value) for value in largest.tolist()]


def gather_over_ranks(rows: Tensor, *, num_ranks: int, device: torch.device) -> Tensor:
    """The rows of all ranks under each other, in the order of the ranks. A collective: every rank calls it.

    Args:
        rows: Of this rank: as many as it has, also none. What follows the first axis has the same shape on every rank.
        num_ranks: Of the run; one needs no process group.
        device: One that the process group can exchange tensors of.

    Returns:
        On the device that `rows` are on.
    """
    if num_ranks == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(num_ranks)]
    torch.distributed.all_gather(counts, torch.tensor([len(rows)], device=device))
    padded = torch.zeros(max(map(int, counts)), *rows.shape[1:], dtype=rows.dtype, device=device)
    padded[: len(rows)] = rows
    of_ranks = [torch.empty_like(padded) for _ in range(num_ranks)]
    torch.distributed.all_gather(of_ranks, padded)
    return torch.cat([part[: int(count)] for part, count in zip(of_ranks, counts, strict=True)]).to(rows.device)


def exchange_over_ranks(value: Any, *, num_ranks: int) -> list[Any]:
    """The value of each rank, pickled on its way. A collective: every rank calls it.

    Args:
        value: Of this rank.
        num_ranks: Of the run; one needs no process group.
    """
    values = [value] * num_ranks
    if num_ranks > 1:
        torch.distributed.all_gather_object(values, value)
    return values

"""What the ranks of a run tell each other: sums."""

from collections.abc import Sequence

import torch


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

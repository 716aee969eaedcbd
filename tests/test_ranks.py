import os

import torch
from torch import multiprocessing

from grpo_lightning.ranks import gather_over_ranks, largest_over_ranks, sum_over_ranks

CPU = torch.device("cpu")


def test_one_rank_needs_no_process_group():
    assert sum_over_ranks([1, True, 0.25], num_ranks=1, device=CPU) == [1.0, 1.0, 0.25]
    assert largest_over_ranks([3, 1], num_ranks=1, device=CPU) == [3, 1]
    rows = torch.ones(2, 3)
    assert gather_over_ranks(rows, num_ranks=1, device=CPU) is rows


def _rank(rank, file, results):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    sums = sum_over_ranks([2**24 + rank, 0.5], num_ranks=2, device=CPU)
    rows = torch.full((2 * rank, 3), 2.0**24 + rank, dtype=torch.float64)  # rank 0 has none
    gathered = [gather_over_ranks(part, num_ranks=2, device=CPU).tolist() for part in (rows, torch.tensor([rank > 0]))]
    results[rank] = [sums, *gathered, largest_over_ranks([2**24 + rank, 5 - rank], num_ranks=2, device=CPU)]
    torch.distributed.destroy_process_group()


def test_two_ranks_have_the_same_sums_rows_and_largest_numbers(tmp_path):
    with multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(_rank, args=(tmp_path / "rendezvous", results), nprocs=2)
        # 2^25 + 1 is no number of fp32.
        wanted = [[2.0**25 + 1, 1.0], [[2.0**24 + 1] * 3] * 2, [False, True], [2**24 + 1, 5]]
        assert dict(results) == {0: wanted, 1: wanted}

import itertools
import random

import pytest

from grpo_lightning.batching.bins import balanced_bins, chunks, cut_finer


def cost(bins, lengths):
    return max(len(b) * max(lengths[i] for i in b) for b in bins if b)


def cheapest_partition(lengths, num_bins):
    """All ways to cut the rows, sorted by length, into exactly `num_bins` runs."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    cuts = itertools.combinations(range(1, len(order)), num_bins - 1)
    runs = ([order[a:b] for a, b in itertools.pairwise((0, *c, len(order)))] for c in cuts)
    return min(cost(r, lengths) for r in runs)


@pytest.mark.parametrize("seed", range(20))
def test_as_cheap_as_the_best_of_all_cuts(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 30) for _ in range(rng.randint(3, 9))]
    num_bins = rng.randint(1, len(lengths))
    bins = balanced_bins(lengths, num_bins)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert len(bins) == num_bins
    assert all(bins)
    assert cost(bins, lengths) == cheapest_partition(lengths, num_bins)


def test_fewer_rows_than_bins_leave_empty_bins():
    bins = balanced_bins([3, 5], 4)
    assert sorted(map(len, bins)) == [0, 0, 1, 1]
    assert balanced_bins([], 3) == [[], [], []]


def test_chunks_respect_the_limit_and_lose_nothing():
    lengths = [7, 3, 3, 3, 2]
    pieces = chunks(range(5), lengths, 7)
    assert sorted(i for p in pieces for i in p) == [0, 1, 2, 3, 4]
    assert all(len(p) * max(lengths[i] for i in p) <= 7 for p in pieces)
    assert chunks([0], lengths, 1) == [[0]]  # one row is never cut
    assert chunks([2, 0], lengths, None) == [[2, 0]]


@pytest.mark.parametrize(
    ("pieces", "number", "finer"),
    [
        ([[0, 1, 2], [3]], 2, [[0, 1, 2], [3]]),
        ([[0, 1, 2], [3]], 3, [[0], [1, 2], [3]]),
        ([[0, 1, 2], [3]], 4, [[0], [1], [2], [3]]),
        ([[0, 1, 2], [3]], 6, [[0], [1], [2], [3], [], []]),
        ([[]], 2, [[], []]),
    ],
)
def test_pieces_are_cut_in_halves_until_there_are_enough(pieces, number, finer):
    assert cut_finer(pieces, number) == finer

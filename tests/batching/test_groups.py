import random

import pytest

from grpo_lightning.batching.groups import Group, balanced_groups, grouped_pieces


def group(prompt, *completions, first=0):
    return Group(prompt, tuple(range(first, first + len(completions))), completions)


def many(rng, num_groups, *, longest=60):
    groups, first = [], 0
    for _ in range(num_groups):
        lengths = [rng.randint(1, longest) for _ in range(rng.randint(1, 8))]
        groups.append(group(rng.randint(1, 40), *lengths, first=first))
        first += len(lengths)
    return groups


def cost_of(groups, members):
    """What a bin costs, each of its groups' prompts once."""
    parts = []
    for g in groups:
        kept = [(i, length) for i, length in zip(g.members, g.completions, strict=True) if i in members]
        if kept:
            parts.append(Group(g.prompt, *map(tuple, zip(*kept, strict=True))))
    return sum(part.cost() for part in parts)


def test_costs_by_hand():
    g = group(100, 10, 20)
    assert g.tokens() == 100 + 10 + 20 - 2
    # Keys seen: 100^2 / 2 by the prompt, 10 x 105 and 20 x 110 by the completions; 4,096 of them cost a token.
    assert g.cost() == pytest.approx(128 + (5000 + 1050 + 2200) / 4096)


def test_a_group_is_cut_into_parts_of_nearly_equal_lengths():
    parts = group(7, 9, 1, 8, 2).cut(2)
    assert [part.completions for part in parts] == [(9, 2), (1, 8)]
    assert [part.members for part in parts] == [(0, 3), (1, 2)]
    assert [part.prompt for part in parts] == [7, 7]


def test_groups_stay_whole_where_they_balance():
    groups = [group(50, 10, 10, first=2 * i) for i in range(4)]
    bins = balanced_groups(groups, 2)
    assert sorted(map(sorted, bins)) in (
        [[0, 1, 2, 3], [4, 5, 6, 7]],
        [[0, 1, 4, 5], [2, 3, 6, 7]],
        [[0, 1, 6, 7], [2, 3, 4, 5]],
    )


def test_a_group_that_is_too_large_is_cut():
    groups = [group(10, *[100] * 8), group(10, 5, first=8)]
    bins = balanced_groups(groups, 2)
    assert sorted(len(set(b) & set(range(8))) for b in bins) == [4, 4]


@pytest.mark.parametrize("seed", range(10))
def test_bins_are_nearly_equal_and_hold_every_completion_once(seed):
    rng = random.Random(seed)
    groups = many(rng, 24)
    num_bins = rng.randint(1, 8)
    bins = balanced_groups(groups, num_bins)
    assert len(bins) == num_bins
    assert sorted(i for b in bins for i in b) == [i for g in groups for i in g.members]
    costs = [cost_of(groups, b) for b in bins]
    assert max(costs) <= 1.2 * sum(costs) / num_bins


def test_bins_are_empty_only_where_completions_are_few():
    assert sorted(map(len, balanced_groups([group(5, 3, 3)], 4))) == [0, 0, 1, 1]
    assert balanced_groups([], 3) == [[], [], []]
    assert sorted(map(len, balanced_groups([group(5, 3, 3), group(5, 3, 3, first=2)], 4))) == [1, 1, 1, 1]


@pytest.mark.parametrize("max_tokens", [1, 40, 90, 10_000])
def test_pieces_respect_the_limit_and_lose_nothing(max_tokens):
    groups = many(random.Random(3), 6)
    pieces = grouped_pieces(groups, max_tokens)
    assert sorted(i for p in pieces for i in p) == [i for g in groups for i in g.members]
    for piece in pieces:
        tokens = sum(
            g.prompt * bool(set(g.members) & set(piece))
            + sum(length - 1 for i, length in zip(g.members, g.completions, strict=True) if i in piece)
            for g in groups
        )
        assert tokens <= max_tokens or len(piece) == 1


def test_without_a_limit_there_is_one_piece():
    assert grouped_pieces([group(5, 3), group(5, 3, first=1)], None) == [[0, 1]]

"""Forwards of nearly equal cost, out of groups that share their prompt."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

KEYS_PER_TOKEN = 4096
"""Attending to so many keys costs as much as the rest of a token: 24 d^2 over 4 d operations a key and layer, for a
width d of some 700. It decides nothing but how equal the costs of long and short sequences are."""
MAX_UNEVENNESS = 1.05
"""Groups are cut only where that makes the costliest forward cheaper by more than this."""


class Group(NamedTuple):
    """Completions of one prompt, by their numbers, in tokens."""

    prompt: int
    members: tuple[int, ...]
    completions: tuple[int, ...]

    def tokens(self) -> int:
        """Those of a forward that computes the prompt once. The last of a completion predicts nothing."""
        return self.prompt + sum(self.completions) - len(self.completions)

    def cost(self) -> float:
        """In tokens, with the attention to their keys."""
        keys = self.prompt**2 / 2 + sum(length * (self.prompt + length / 2) for length in self.completions)
        return self.tokens() + keys / KEYS_PER_TOKEN

    def cut(self, num_parts: int) -> list["Group"]:
        """Parts of nearly equal lengths, each with the prompt."""
        order = sorted(range(len(self.members)), key=lambda i: -self.completions[i])
        parts = [sorted(order[start::num_parts]) for start in range(num_parts)]
        return [
            Group(self.prompt, tuple(self.members[i] for i in part), tuple(self.completions[i] for i in part))
            for part in parts
        ]


def balanced_groups(groups: Sequence[Group], num_bins: int) -> list[list[int]]:
    """Spread completions over exactly `num_bins` bins of nearly equal cost.

    Groups stay whole, so that their prompts are computed once, unless a group is too large: then it is cut, and its
    prompt computed once for each part.

    Returns:
        The members of each bin; some are empty only where there are fewer completions than bins.
    """
    if num_bins == 1:
        return [[i for group in groups for i in group.members]]
    limit = max((group.cost() for group in groups), default=0.0)
    singles = [single for group in groups for single in group.cut(len(group.members))]
    smallest = max((single.cost() for single in singles), default=0.0)
    candidates = []
    while limit > smallest:
        candidates.append(_fill_evenly(_cut_to(groups, limit, Group.cost), num_bins))
        limit *= 0.85
    candidates.append(_fill_evenly(singles, num_bins))
    fewest = min(sum(not b for b in bins) for bins in candidates)
    full = [bins for bins in candidates if sum(not b for b in bins) == fewest]
    least = min(_costliest(bins) for bins in full)
    bins = next(bins for bins in full if _costliest(bins) <= MAX_UNEVENNESS * least)
    return [[i for group in b for i in group.members] for b in bins]


def grouped_pieces(groups: Sequence[Group], max_tokens: int | None) -> list[list[int]]:
    """Cut completions into pieces of at most `max_tokens` tokens, prompts counted once in each; None cuts nothing."""
    if max_tokens is None:
        return [[i for group in groups for i in group.members]]
    pieces: list[list[int]] = []
    left = 0
    for unit in _cut_to(groups, max_tokens, Group.tokens):
        if unit.tokens() > left:
            pieces.append([])
            left = max_tokens
        pieces[-1] += unit.members
        left -= unit.tokens()
    return pieces


def _cut_to(groups: Sequence[Group], limit: float, size: Callable[[Group], float]) -> list[Group]:
    """Cut each group into the fewest parts that reach the limit, or into single completions."""
    units: list[Group] = []
    for group in groups:
        parts = [group]
        while max(map(size, parts)) > limit and len(parts) < len(group.members):
            parts = group.cut(len(parts) + 1)
        units += parts
    return units


def _fill_evenly(units: Sequence[Group], num_bins: int) -> list[list[Group]]:
    """The costliest first, each into the bin that is cheapest so far."""
    bins: list[list[Group]] = [[] for _ in range(num_bins)]
    costs = [0.0] * num_bins
    for unit in sorted(units, key=lambda unit: -unit.cost()):
        cheapest = min(range(num_bins), key=costs.__getitem__)
        bins[cheapest].append(unit)
        costs[cheapest] += unit.cost()
    return bins


def _costliest(bins: Sequence[Sequence[Group]]) -> float:
    return max(sum(unit.cost() for unit in b) for b in bins)

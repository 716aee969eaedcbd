"""Micro-batches: completions spread over a given number of bins of nearly equal cost."""

from collections.abc import Sequence


def balanced_bins(lengths: Sequence[int], num_bins: int) -> list[list[int]]:
    """Split completions into exactly `num_bins` bins whose costliest is as cheap as sorting by length allows.

    A bin costs its padded size: rows times the longest row. Rows of similar length share a bin, so little is padding.

    Args:
        lengths: Tokens of each row, prompt and completion.
        num_bins: Number of bins, >= 1; bins beyond the number of rows are empty.

    Returns:
        The indices of each bin.

    Example:
        >>> balanced_bins([10, 2, 2, 2, 2, 2], 2)
        [[0], [1, 2, 3, 4, 5]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    low, high = max(lengths, default=0), sum(lengths) and max(lengths) * len(lengths)
    while low < high:
        middle = (low + high) // 2
        if len(_fill(order, lengths, middle)) <= num_bins:
            high = middle
        else:
            low = middle + 1
    bins = _fill(order, lengths, low)
    while len(bins) < min(num_bins, len(lengths)):
        costliest = max((b for b in bins if len(b) > 1), key=lambda b: len(b) * lengths[b[0]])
        at, half = bins.index(costliest), len(costliest) // 2
        bins[at : at + 1] = [costliest[:half], costliest[half:]]
    return bins + [[] for _ in range(num_bins - len(bins))]


def chunks(indices: Sequence[int], lengths: Sequence[int], max_tokens: int | None) -> list[list[int]]:
    """Cut a bin into pieces of at most `max_tokens` padded tokens each (at least one row each); None cuts nothing."""
    order = sorted(indices, key=lambda i: -lengths[i])
    return [list(indices)] if max_tokens is None or not indices else _fill(order, lengths, max_tokens)


def cut_finer(pieces: Sequence[Sequence[int]], num_pieces: int) -> list[list[int]]:
    """Cut pieces in halves, the one with the most rows first, until there are so many; none of one row is cut.

    Args:
        pieces: The rows of each.
        num_pieces: At least as many as there are. Where there are fewer rows, the last ones are empty.

    Example:
        >>> cut_finer([[0, 1, 2], [3]], 3)
        [[0], [1, 2], [3]]
    """
    finer = [list(piece) for piece in pieces]
    while len(finer) < num_pieces and max(map(len, finer)) > 1:
        at = max(range(len(finer)), key=lambda i: len(finer[i]))
        half = len(finer[at]) // 2
        finer[at : at + 1] = [finer[at][:half], finer[at][half:]]
    return finer + [[] for _ in range(num_pieces - len(finer))]


def _fill(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut the rows, longest first, into runs of at most `budget` padded tokens."""
    bins: list[list[int]] = []
    for i in order:
        if bins and (len(bins[-1]) + 1) * lengths[bins[-1][0]] <= budget:
            bins[-1].append(i)
        else:
            bins.append([i])
    return bins

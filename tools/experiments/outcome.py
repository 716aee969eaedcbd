"""From curves to the one number that an experiment is about, and how often chance alone would order it so."""

import math
from collections.abc import Sequence

from tools.experiments.training import Curves


def mean_of_last(values: Sequence[float], number: int) -> float:
    """The mean of the last `number` values.

    Example:
        >>> mean_of_last([5.0, 1.0, 2.0], 2)
        1.5
    """
    last = values[-number:]
    return sum(last) / len(last)


def growth(values: Sequence[float], number: int) -> float:
    """The mean of the last `number` values less that of the first `number`.

    Example:
        >>> growth([1.0, 3.0, 4.0, 6.0], 2)
        3.0
    """
    return mean_of_last(values, number) - mean_of_last(values[:number], number)


def updates_to(curves: Curves, accuracy: float) -> float:
    """After how many updates an evaluation first found this accuracy; infinitely many where none did.

    Example:
        >>> updates_to({"evaluated": [0, 5, 10], "held_out": [0.2, 0.7, 0.6]}, 0.6)
        5
    """
    pairs = zip(curves["evaluated"], curves["held_out"], strict=True)
    return next((update for update, found in pairs if found >= accuracy), math.inf)


def sign_test(differences: Sequence[float]) -> float:
    r"""The one-sided exact sign test: how often as many of n fair coins or more would show heads.

    ``p = sum_{k >= K} C(n, k) / 2^n``, K the number of positive differences of the n that are not 0. The smallest
    value of five pairs is 1/32.

    Example: four of four, and three of four.
        >>> sign_test([1.0, 2.0, 0.5, 3.0]), sign_test([1.0, 2.0, -0.5, 3.0])
        (0.0625, 0.3125)
    """
    signs = [difference > 0 for difference in differences if difference]
    n = len(signs)
    return sum(math.comb(n, k) for k in range(sum(signs), n + 1)) / 2**n

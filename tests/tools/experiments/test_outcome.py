import math

import pytest

from tools.experiments import outcome


def test_growth_is_from_the_first_values_to_the_last():
    # (7 + 9) / 2 - (1 + 3) / 2; the 100 in the middle belongs to neither.
    assert outcome.growth([1.0, 3.0, 100.0, 7.0, 9.0], 2) == 6.0


def test_a_target_is_reached_at_the_first_evaluation_that_finds_it():
    curves = {"evaluated": [0, 4, 8, 12], "held_out": [0.1, 0.5, 0.4, 0.9]}
    assert outcome.updates_to(curves, 0.5) == 4
    assert outcome.updates_to(curves, 0.6) == 12
    assert outcome.updates_to(curves, 0.95) == math.inf


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        # Of 32 equally likely signs of five differences, as many or more are positive in:
        ([1, 2, 3, 4, 5], 1 / 32),
        ([1, 2, 3, 4, -5], 6 / 32),  # 5 + 1
        ([1, 2, 3, -4, -5], 16 / 32),  # 10 + 5 + 1
        ([-1, -2, -3, -4, -5], 1),
        ([1, 2, 3, 4, 0], 1 / 16),  # a tie says nothing
        ([0, 0], 1),
    ],
)
def test_the_sign_test_counts_the_coins_that_show_as_many_heads(differences, p):
    assert outcome.sign_test(differences) == p

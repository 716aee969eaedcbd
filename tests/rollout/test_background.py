"""Functions in the background: what they return, and what they raise."""

import pytest

from grpo_lightning.rollout.background import in_background


def test_what_is_returned_is_the_result():
    assert in_background(divmod, 7, 2).result(10) == (3, 1)


def test_what_is_raised_is_raised_by_the_result():
    with pytest.raises(ZeroDivisionError):
        in_background(divmod, 7, 0).result(10)

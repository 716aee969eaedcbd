import pytest
import torch

from grpo_lightning.groups import DropZeroVariance, GroupFilter, KeepAll

NAN = float("nan")
REWARDS_PG = torch.tensor(
    [
        [1.0, 0.0, 1.0],  # differ
        [1.0, 1.0, 1.0],  # all right
        [0.0, 0.0, 0.0],  # all wrong
        [1.0, 1.0, NAN],  # the two that are left do not differ
        [0.0, NAN, 1.0],  # the two that are left do
        [1.0, NAN, NAN],  # one alone differs from nothing
        [NAN, NAN, NAN],
    ],
    dtype=torch.float64,
)
VALID_PG = ~REWARDS_PG.isnan()


def test_every_group_is_kept():
    assert KeepAll().keep(REWARDS_PG, VALID_PG).tolist() == [True] * 7


def test_groups_without_a_signal_are_dropped():
    kept_P = DropZeroVariance().keep(REWARDS_PG, VALID_PG)
    assert kept_P.tolist() == [True, False, False, False, True, False, False]
    assert kept_P.dtype == torch.bool


@pytest.mark.parametrize("groups", [KeepAll(), DropZeroVariance()], ids=lambda groups: type(groups).__name__)
def test_a_group_is_judged_by_itself(groups):
    whole_P = groups.keep(REWARDS_PG, VALID_PG)
    for p in range(7):
        assert groups.keep(REWARDS_PG[p : p + 1], VALID_PG[p : p + 1]).tolist() == [whole_P[p].item()]
    assert groups.keep(REWARDS_PG[:0], VALID_PG[:0]).tolist() == []


def test_a_filter_says_what_it_keeps():
    with pytest.raises(TypeError, match="keep"):
        GroupFilter()

import pytest

from grpo_lightning.objective import GroupStd, TopEntropyTokens, TruncatedCompletions
from grpo_lightning.objective.settings import described


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (None, {"x": "None"}),
        (GroupStd(ddof=1, epsilon=0.5), {"x": "GroupStd", "x.ddof": "1", "x.epsilon": "0.5"}),
        (
            (TruncatedCompletions(), TopEntropyTokens(share=0.2)),
            {"x": "2 of them", "x[0]": "TruncatedCompletions", "x[1]": "TopEntropyTokens", "x[1].share": "0.2"},
        ),
    ],
)
def test_every_setting_has_its_key(part, expected):
    assert described("x", part) == expected


def test_a_part_of_ones_own_needs_no_repr():
    class Own:
        def __init__(self, width):
            self.width = width

    assert described("x", Own(2)) == described("x", Own(2)) == {"x": "Own", "x.width": "2"}
    assert described("x", Own(3)) != described("x", Own(2))

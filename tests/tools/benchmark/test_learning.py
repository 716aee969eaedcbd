"""Who trains when: with workers that need no framework."""

from pathlib import Path

import pytest

from tools.benchmark import learning
from tools.benchmark.learning import learn
from tools.benchmark.measure import OURS, OURS_BF16, TRL, Conditions
from tools.benchmark.protocol import Report


class Pupil:
    """Ten points of accuracy per update, from 60 %; each update takes its seconds."""

    def __init__(self, seconds):
        self.seconds, self.num_updates = seconds, 0

    def wait_until_ready(self):
        pass

    def ask(self, command, argument=None):
        if command == "accuracy":
            return 0.6 + 0.1 * self.num_updates
        self.num_updates += 1
        return Report(seconds=self.seconds, peak_bytes=0, lengths=())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def looks():
    return []


@pytest.fixture
def conditions(looks):
    return Conditions(
        our_python="",
        trl_python="",
        num_rounds=1,
        num_threads=1,
        is_reduced=False,
        before_round=lambda: looks.append(1),
    )


@pytest.fixture(autouse=True)
def pupils(monkeypatch):
    pupils = {OURS: Pupil(1.0), TRL: Pupil(3.0), OURS_BF16: Pupil(0.5)}
    pupils[TRL].num_updates = -4  # it begins at 20 %
    monkeypatch.setattr(learning, "_worker", lambda name, *_: pupils[name])
    monkeypatch.setattr(learning, "multiplies_bf16", lambda: False)
    return pupils


def test_each_trains_until_it_has_arrived(conditions, looks):
    curves = learn(conditions, Path(), block=2)
    # 60, 80, 100 % after 0, 2, 4 updates of 1 s. The other: 20, 40, 60, 80, 100 % after 0, 2, 4, 6, 8 updates of 3 s.
    assert curves[OURS].seconds == [0.0, 2.0, 4.0]
    assert curves[OURS].updates == [0, 2, 4]
    assert curves[TRL].accuracies == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert curves[TRL].seconds_to_target == 24.0
    assert len(looks) == 2 + 4


def test_the_updates_are_bounded(conditions, pupils):
    curves = learn(conditions, Path(), block=2, max_updates=5)
    assert curves[OURS].has_arrived
    assert curves[TRL].seconds_to_target == float("inf")
    assert pupils[TRL].num_updates == 0


def test_half_precision_learns_too_where_it_is_not_emulated(conditions, monkeypatch):
    assert set(learn(conditions, Path())) == {OURS, TRL}
    monkeypatch.setattr(learning, "multiplies_bf16", lambda: True)
    curves = learn(conditions, Path())
    assert curves[OURS_BF16].accuracies == pytest.approx([0.6, 0.7, 0.8, 0.9])

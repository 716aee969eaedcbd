from types import SimpleNamespace

import pytest
from lightning.pytorch.profilers import PassThroughProfiler

from grpo_lightning import phases
from grpo_lightning.phases import timed_phase


class Watcher:
    def __init__(self):
        self.seen = []

    def on_phase(self, trainer, module, name):
        self.seen.append((trainer, module, name))


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(phases, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def trainer(*callbacks):
    return SimpleNamespace(callbacks=list(callbacks), profiler=PassThroughProfiler())


def test_seconds_add_up_by_phase(clock):
    seconds = {"score": 1.0}
    for name, duration in (("generate", 2.0), ("score", 0.5), ("generate", 4.0)):
        with timed_phase(name, seconds, trainer=trainer(), module=None):
            clock.now += duration
    assert seconds == {"generate": 6.0, "score": 1.5}


def test_a_phase_that_raises_is_timed_and_ended(clock):
    seconds, watcher = {}, Watcher()

    def score():
        with timed_phase("score", seconds, trainer=trainer(watcher), module=None):
            clock.now += 3.0
            raise KeyError

    with pytest.raises(KeyError):
        score()
    assert seconds == {"score": 3.0}
    assert watcher.seen[-1][-1] is None


def test_callbacks_that_watch_are_told_and_the_others_left_alone(clock):
    watcher = Watcher()
    run, module = trainer(object(), watcher), object()
    with timed_phase("generate", {}, trainer=run, module=module):
        assert watcher.seen == [(run, module, "generate")]
    assert watcher.seen == [(run, module, "generate"), (run, module, None)]


def test_what_a_callback_does_at_the_beginning_is_not_timed(clock):
    class Slow:
        def on_phase(self, trainer, module, name):
            clock.now += 10.0

    seconds = {}
    with timed_phase("generate", seconds, trainer=trainer(Slow()), module=None):
        clock.now += 1.0
    assert seconds == {"generate": 1.0}

"""The order of a measurement: with workers that need no framework."""

from pathlib import Path

import pytest

from tools.benchmark import measure as module
from tools.benchmark.measure import OURS, OURS_BF16, TRL, Conditions, measure
from tools.benchmark.protocol import Hello, Report
from tools.benchmark.workloads import Goals, ModelShape, Workload

WORKLOAD = Workload(
    name="tiny",
    model=ModelShape(vocabulary=5, hidden=2, intermediate=3, layers=1, heads=1),
    num_prompts=1,
    prompt_tokens=2,
    group_size=2,
    max_new_tokens=3,
    goals=Goals(rollout=1.0, bf16=1.0),
)


class Scripted:
    """Draws (1, 3) where no lengths are asked of it, and logs what it is asked."""

    def __init__(self, name, log, lengths=None):
        self.name, self.log, self.lengths = name, log, lengths

    def wait_until_ready(self):
        return Hello(framework=self.name, base_bytes=1000, num_parameters=10)

    def ask(self, command, argument=None):
        self.log.append((self.name, command))
        if command == "rate":
            return 100.0 + len(self.log)
        return Report(seconds=float(len(self.log)), peak_bytes=1, lengths=self.lengths or argument or (1, 3))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.log.append((self.name, "closed"))


@pytest.fixture
def log():
    return []


@pytest.fixture
def conditions(log):
    return Conditions(
        our_python="",
        trl_python="",
        num_rounds=2,
        num_threads=1,
        is_reduced=False,
        before_round=lambda: log.append(("machine", "looked at")),
    )


@pytest.fixture
def workers(monkeypatch, log):
    workers = {name: Scripted(name, log) for name in (OURS, TRL, OURS_BF16)}
    monkeypatch.setattr(module, "_worker", lambda name, *_: workers[name])
    monkeypatch.setattr(module, "write_model_folder", lambda *_, **__: None)
    monkeypatch.setattr(module, "multiplies_bf16", lambda: True)
    return workers


def test_half_precision_is_not_measured_where_it_is_emulated(workers, conditions, log, monkeypatch):
    monkeypatch.setattr(module, "multiplies_bf16", lambda: False)
    assert set(measure(WORKLOAD, conditions, Path()).steps) == {OURS, TRL}
    assert (OURS_BF16, "step") not in log


def test_they_take_turns_and_the_first_rounds_are_not_counted(workers, conditions, log):
    measurement = measure(WORKLOAD, conditions, Path())
    look, rate = ("machine", "looked at"), (OURS, "rate")
    steps = [look, (OURS, "step"), (TRL, "step"), (OURS_BF16, "step"), rate]
    rollouts = [look, (OURS, "rollout"), (TRL, "rollout")]
    assert log[: 4 * len(steps)] == 4 * steps
    assert log[4 * len(steps) : -3] == 3 * rollouts
    assert [what for _, what in log[-3:]] == 3 * ["closed"]
    assert {name: len(reports) for name, reports in measurement.steps.items()} == {OURS: 2, TRL: 2, OURS_BF16: 2}
    assert len(measurement.rollouts[OURS]) == 2


def test_the_rate_is_the_best_of_the_rounds(workers, conditions):
    assert measure(WORKLOAD, conditions, Path()).rate == 100.0 + 20  # of the fourth round, the 20th entry of the log


def test_the_least_memory_is_process_weights_gradients_moments_and_reference(workers, conditions):
    assert measure(WORKLOAD, conditions, Path()).resident_bytes == 1000 + 5 * 4 * 10


def test_completions_of_other_lengths_are_no_comparison(workers, conditions):
    workers[TRL].lengths = (2, 2)
    with pytest.raises(RuntimeError, match="differ"):
        measure(WORKLOAD, conditions, Path())

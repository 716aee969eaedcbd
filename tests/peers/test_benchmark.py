"""The benchmark's workers, each in its framework's own training loop: a reduced workload, end to end."""

import sys
from dataclasses import replace

import pytest

from tools.benchmark.measure import OURS, TRL, Conditions, measure
from tools.benchmark.workloads import WORKLOADS, Goals


@pytest.fixture(scope="module")
def rounds():
    """How often the machine was looked at."""
    return []


@pytest.fixture(scope="module")
def measurement(tmp_path_factory, rounds):
    conditions = Conditions(
        our_python=sys.executable,
        trl_python=sys.executable,
        num_rounds=2,
        num_threads=1,
        is_reduced=True,
        before_round=lambda: rounds.append(1),
    )
    workload = replace(WORKLOADS["W3"], goals=Goals(rollout=1.0))
    return measure(workload, conditions, tmp_path_factory.mktemp("model"))


def test_both_made_every_counted_step(measurement):
    assert {name: len(reports) for name, reports in measurement.steps.items()} == {OURS: 2, TRL: 2}
    assert all(report.seconds > 0 for reports in measurement.steps.values() for report in reports)
    assert measurement.frameworks[TRL] == "TRL 1.16.0"


def test_both_drew_completions_of_the_same_lengths(measurement):
    for ours, theirs in zip(measurement.steps[OURS], measurement.steps[TRL], strict=True):
        assert ours.lengths == theirs.lengths
    assert len({length for report in measurement.steps[OURS] for length in report.lengths}) > 1, "they must be ragged"


def test_the_machine_is_looked_at_before_every_round(measurement, rounds):
    assert len(rounds) == (2 + 2) + (1 + 2)  # two steps after two that warm up, two rollouts after one


def test_rollouts_are_measured_alone(measurement):
    assert measurement.rollout_ratio > 0
    assert [r.lengths for r in measurement.rollouts[OURS]] == [r.lengths for r in measurement.rollouts[TRL]]


def test_phases_add_up_to_at_most_the_step(measurement):
    for report in measurement.steps[OURS]:
        assert {"generate", "update"} <= set(report.seconds_by_phase)
        assert sum(report.seconds_by_phase.values()) <= report.seconds


def test_memory_is_measured_in_the_step(measurement):
    assert measurement.resident_bytes < measurement.peak_bytes(OURS) < 10 * measurement.resident_bytes
    assert measurement.floor_ratio > 1

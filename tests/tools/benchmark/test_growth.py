"""Steps along a quantity: the arithmetic with a worker that computes nothing, and a trial as a whole."""

import json

import pytest

pytest.importorskip("matplotlib")

from tools.benchmark import growth as module
from tools.benchmark import machine
from tools.benchmark.floor import step_flops
from tools.benchmark.growth import Growth, Point, main, measure_point
from tools.benchmark.protocol import Hello, Report
from tools.benchmark.series import SERIES

WORKLOAD = SERIES["prompts"].points[1]
LENGTHS = (64,) * 8


class Scripted:
    """Takes 9 s and much memory for its first step, then 3, 1 and 2 s."""

    def __init__(self, *_, **__):
        self.seconds = iter([9.0, 3.0, 1.0, 2.0])

    def wait_until_ready(self):
        return Hello(framework="", base_bytes=1000, num_parameters=10)

    def ask(self, command, argument=None):
        seconds = next(self.seconds)
        return Report(seconds=seconds, peak_bytes=1500 + int(seconds), lengths=LENGTHS)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_a_point_is_the_median_of_the_counted_steps_and_their_largest_memory(monkeypatch):
    looks = []
    monkeypatch.setattr(module, "Worker", Scripted)
    monkeypatch.setattr(module, "write_model_folder", lambda *_, **__: None)
    point = measure_point(1, WORKLOAD, num_steps=3, num_threads=1, before_step=lambda: looks.append(1))
    assert len(looks) == 4
    # The peak is the step's of 3 s: 1503 bytes, of them 1000 of the process and 5 * 4 * 10 of what the weights need.
    assert (point.seconds, point.peak_bytes, point.working_bytes) == (2.0, 1503, 303)
    assert point.flops == step_flops(WORKLOAD, LENGTHS).total


def test_costs_are_relative_to_the_first_point():
    # 2 s for 4 operations, then 9 s for 12: 0.5 and 0.75 s per operation.
    points = [
        Point(value=value, seconds=seconds, flops=flops, peak_bytes=0, working_bytes=0)
        for value, seconds, flops in [(1, 2.0, 4), (2, 9.0, 12)]
    ]
    assert Growth(quantity="prompts", points=points).relative_costs == [1.0, 1.5]


def test_on_a_busy_machine_nothing_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (100.0, 0.0, 0.0))
    monkeypatch.setattr(machine.time, "sleep", lambda seconds: None)  # does not wait for the load to fall
    assert main(["--output", str(tmp_path)]) == 1
    assert "Nothing is claimed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_trial_writes_numbers_and_a_figure(tmp_path):
    arguments = ["--reduced", "--allow-busy", "--steps", "1", "--threads", "1", "--quantities", "prompts"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "growth.json").read_text())
    assert not written["conditions"]["is_a_measurement"]
    first, second = written["growth"]["prompts"]
    assert (first["value"], second["value"]) == (1, 2)
    assert second["flops"] == 2 * first["flops"]
    assert first["seconds"] > 0
    assert first["working_bytes"] > 0
    assert "<svg" in (tmp_path / "growth.svg").read_text()

"""The check for a GPU, on the CPU."""

import json
import math

import pytest
import torch

from tools import check_gpu
from tools.benchmark.gpu import TINY
from tools.check_gpu import TOLERANCES, Recorded, differences, is_within, main, train


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_device_it_says_so(capsys):
    assert main([]) == 1
    assert capsys.readouterr().err == "There is no CUDA device here.\n"


@pytest.fixture(scope="module")
def expected():
    engine = Recorded()
    return train(TINY, "single", "fp32", "cpu", num_steps=1, engine=engine), engine.completions


def test_the_same_run_has_the_same_numbers(expected):
    numbers, completions = expected
    again = train(TINY, "single", "fp32", "cpu", num_steps=1, engine=Recorded(completions))
    assert differences(again, numbers) == dict.fromkeys(TOLERANCES["fp32"], 0.0)
    assert numbers.gradient_norms[0] > 0


def test_bf16_is_near_and_not_the_same(expected):
    numbers, completions = expected
    found = differences(train(TINY, "single", "bf16", "cpu", num_steps=1, engine=Recorded(completions)), numbers)
    assert is_within(found, TOLERANCES["bf16"])
    assert not is_within(found, TOLERANCES["fp32"])


@pytest.mark.parametrize("name", TOLERANCES["fp32"])
@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_number_that_is_off_is_found(name, value):
    assert is_within(dict.fromkeys(TOLERANCES["fp32"], 0.0), TOLERANCES["fp32"])
    assert not is_within({**dict.fromkeys(TOLERANCES["fp32"], 0.0), name: value}, TOLERANCES["fp32"])


def test_a_strategy_that_fails_is_wrong(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(check_gpu.sys, "executable", "false")
    assert main(["--device", "cpu", "--reduced", "--strategies", "single", "--output", str(tmp_path)]) == 1
    assert "single: FAILED" in capsys.readouterr().out


@pytest.mark.slow
def test_a_trial_on_the_cpu_checks_every_strategy(tmp_path, capsys):
    assert main(["--device", "cpu", "--reduced", "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "check_gpu.json").read_text())["results"]
    assert [found["strategy"] for found in results] == list(check_gpu.STRATEGIES)
    for found in results:
        assert len(found["losses"]) == check_gpu.ITERATIONS
        assert found["peak_gib"] > 0
        assert found["strategy"] == "single" or found["differences"]["fp32"]["loss"] <= TOLERANCES["fp32"]["loss"]
    assert capsys.readouterr().out.count("right") == 3

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "tools" / "benchmark_rollout.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("benchmark_rollout", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small(script, monkeypatch):
    workload = replace(
        script.WORKLOADS["W3"], width=16, intermediate=16, num_layers=1, num_heads=2, num_prompts=2, group_size=3,
        max_new_tokens=20,
    )  # fmt: skip
    monkeypatch.setitem(script.WORKLOADS, "W3", workload)
    return workload


def test_medians_and_ratios_are_worked_by_hand(script):
    def timing(tokens, seconds, processor):
        return script.Timing(num_tokens=tokens, seconds=seconds, processor_seconds=processor)

    pairs = [
        (timing(100, 1.0, 1.0), timing(100, 2.0, 4.0)),  # 100 and 50 tokens/s; 2 and 4 times
        (timing(100, 2.0, 1.0), timing(100, 10.0, 3.0)),  # 50 and 10; 5 and 3
        (timing(90, 0.5, 1.0), timing(90, 1.5, 2.0)),  # 180 and 60; 3 and 2
    ]
    assert script.summarize(pairs) == {
        "engine_tokens_per_second": 100,
        "generate_tokens_per_second": 50,
        "ratio": 3,
        "processor_ratio": 3,
    }


def test_each_row_ends_at_its_own_length(script):
    ends = script.EndsAt(torch.tensor([1, 3]), prompt_tokens=4)
    assert [ends(torch.zeros(2, length), None).tolist() for length in (5, 6, 7)] == [
        [True, False], [True, False], [True, True]
    ]  # fmt: skip


def test_it_prints_the_conditions_and_writes_every_timing(script, small, tmp_path, capsys):
    output, threads = tmp_path / "rollout.json", torch.get_num_threads()
    script.main(
        ["--workloads", "W3", "--pairs", "2", "--threads", str(threads), "--max-rows", "4", "--output", str(output)]
    )
    written = json.loads(output.read_text())
    assert written["conditions"]["threads"] == threads
    assert '"max_rows": 4' in capsys.readouterr().out
    assert len(written["W3"]["pairs"]) == 2
    for ours, its in written["W3"]["pairs"]:
        # Both draw as many tokens, which are fewer than the limit allows.
        assert ours["num_tokens"] == its["num_tokens"] <= 6 * small.max_new_tokens
        assert min(ours["seconds"], its["seconds"]) > 0

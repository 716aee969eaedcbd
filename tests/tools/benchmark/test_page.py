import json

import pytest

from tools.benchmark import page


def test_what_no_phase_has_is_the_updates():
    # 10 s in all: 4 + 1 + 2 are named, and of the update only the forward pass is; at 2 operations per second.
    step = {"peak_bytes": 0, "seconds_by_phase": {"generate": 4.0, "score": 1.0, "prepare": 2.0, "update": 1.0}}
    flops = {"prefill": 1, "decode": 5, "reference": 2, "update": 4}
    found = page.phases(
        {
            "workloads": [
                {
                    "workload": {"name": "W0"},
                    "steps": {"ours": [step]},
                    "median_seconds": {"ours": 10.0},
                    "floor_flops": [flops],
                    "matmul_flops_per_second": 2.0,
                }
            ]
        }
    )
    assert found.splitlines()[-1] == "| W0 | 4.00 | 3.00 | 2.00 | 1.00 | 3.00 | 2.00 |"


def test_the_page_has_every_table_of_the_committed_figures():
    text = (page.FIGURES.parent / "performance.md").read_text()
    tables = list(page.tables())
    assert len(tables) == 4 + 4
    for table in tables:
        assert table in text


@pytest.mark.parametrize("name", ["benchmark", "growth"])
def test_the_committed_figures_are_whole_measurements(name):
    conditions = json.loads((page.FIGURES / f"{name}.json").read_text())["conditions"]
    assert conditions["is_a_measurement"]
    assert not conditions["is_reduced"]
    assert conditions["rounds" if name == "benchmark" else "steps"] >= {"benchmark": 5, "growth": 3}[name]

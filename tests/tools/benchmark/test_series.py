"""What grows along a series, and what stays."""

from dataclasses import asdict

import pytest

from tools.benchmark.series import POINTS, SERIES
from tools.benchmark.workloads import WORKLOADS

# Prompts, tokens of a prompt, G, new tokens; None for what grows.
STATED = {
    "prompts": ((None, 16, 8, 64), [1, 2, 4, 8]),
    "prompt_tokens": ((2, None, 8, 16), [32, 128, 512, 1024]),
    "group_size": ((2, 128, None, 32), [4, 8, 16, 32]),
    "vocabulary": ((2, 16, 8, 32), [2_000, 8_000, 32_000, 128_000]),
}


@pytest.mark.parametrize("quantity", SERIES)
def test_the_points_are_as_stated(quantity):
    sizes, values = STATED[quantity]
    points = SERIES[quantity].points
    assert list(points) == values
    for value, workload in points.items():
        found = (workload.num_prompts, workload.prompt_tokens, workload.group_size, workload.max_new_tokens)
        assert found == tuple(value if size is None else size for size in sizes)
        if quantity == "vocabulary":
            assert (workload.model.vocabulary, workload.model.layers, workload.model.hidden) == (value, 2, 128)
        else:
            assert workload.model == WORKLOADS["W1"].model


@pytest.mark.parametrize("quantity", SERIES)
def test_one_quantity_alone_grows(quantity):
    described = []
    for workload in SERIES[quantity].points.values():
        fields = asdict(workload)
        described.append({**fields.pop("model"), **fields})
    differing = {name for name in described[0] if len({str(fields[name]) for fields in described}) > 1}
    assert differing == {"name", "num_prompts" if quantity == "prompts" else quantity}


def test_a_name_is_one_point_and_no_workload_of_the_benchmark():
    assert len(POINTS) == sum(len(series.points) for series in SERIES.values())
    assert not set(POINTS) & set(WORKLOADS)


def test_the_trial_has_the_first_two_points():
    assert list(SERIES["group_size"].reduced().points) == [4, 8]

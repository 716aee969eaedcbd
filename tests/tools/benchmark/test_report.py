import json

import pytest

from tools.benchmark.floor import step_flops
from tools.benchmark.learning import Curve
from tools.benchmark.measure import OURS, OURS_BF16, TRL, Measurement
from tools.benchmark.protocol import Report
from tools.benchmark.report import Figure, as_json, describe, describe_learning, figures
from tools.benchmark.workloads import Goals, ModelShape, Workload

GIB = 2**30
WORKLOAD = Workload(
    name="tiny",
    model=ModelShape(vocabulary=5, hidden=2, intermediate=3, layers=1, heads=1),
    num_prompts=1,
    prompt_tokens=2,
    group_size=2,
    max_new_tokens=3,
    goals=Goals(speedup=3.0, memory=0.3, resident=1.3, floor=1.5, rollout=2.0, bf16=1.5),
)


def reports(*seconds, gib=1, lengths=(1, 3)):
    return [
        Report(seconds=s, peak_bytes=gib * GIB, lengths=lengths, seconds_by_phase={"update": s / 2}) for s in seconds
    ]


@pytest.fixture
def measurement():
    return Measurement(
        workload=WORKLOAD,
        frameworks={OURS: "ours 1", TRL: "TRL 2"},
        steps={OURS: reports(1, 2, 4), TRL: reports(8, 4, 12, gib=4), OURS_BF16: reports(1, 1, 1)},
        rollouts={OURS: reports(1.0), TRL: reports(4.0)},
        rate=2060.0,
        resident_bytes=GIB // 2,
    )


def test_ratios_are_medians_over_the_rounds(measurement):
    # Rounds: 8/1, 4/2, 12/4 are 8, 2, 3. The ratio of the medians would be 8/2.
    assert measurement.median_ratio(TRL, OURS) == 3.0


def test_the_floor_is_the_counted_work_at_the_measured_rate(measurement):
    # Lengths 1 and 3 take 2060 operations (see the floor's tests): a second at 2060 per second.
    assert step_flops(WORKLOAD, (1, 3)).total == 2060
    assert measurement.floor_seconds == 1.0
    assert measurement.floor_ratio == 2.0


def test_every_ratio_is_held_against_its_goal(measurement):
    met = {figure.what: (figure.value, figure.is_met) for figure in figures(measurement)}
    assert met == {
        "TRL's step / ours": (3.0, True),
        "our step / counted floor": (2.0, False),
        "our peak memory / TRL's": (0.25, True),
        "our peak memory / process with optimizer state": (2.0, False),
        "our tokens/s / transformers' generate": (4.0, True),
        "our fp32 step / our bf16 step": (2.0, True),
    }


@pytest.mark.parametrize(("value", "at_least", "verdict"), [(1.0, True, "MISSED"), (1.0, False, "met")])
def test_a_goal_has_a_side(value, at_least, verdict):
    assert str(Figure(workload="W", what="a", value=value, goal=2.0, at_least=at_least)).endswith(verdict)


def test_the_description_has_medians_ranges_and_phases(measurement):
    text = describe(measurement)
    assert "2.000 s/step (1.000 .. 4.000), peak 1.00 GiB" in text
    assert "8.000 s/step (4.000 .. 12.000), peak 4.00 GiB" in text
    assert "ours: update 1.000 s, rest 1.000 s" in text


def test_the_json_has_every_step(measurement):
    written = json.loads(json.dumps(as_json([measurement], {"threads": 1})))
    assert written["conditions"] == {"threads": 1}
    (workload,) = written["workloads"]
    assert [report["seconds"] for report in workload["steps"][TRL]] == [8, 4, 12]
    assert workload["median_seconds"] == {OURS: 2, TRL: 8, OURS_BF16: 1}


def test_who_never_arrives_took_for_ever():
    arrived = Curve(accuracies=[0.4, 0.95], seconds=[0.0, 5.0], updates=[0, 5])
    lost = Curve(seconds=[0.0, 9.0], updates=[0, 5], accuracies=[0.4, 0.5])
    assert arrived.seconds_to_target == 5.0
    text = describe_learning({OURS: arrived, TRL: lost})
    assert "40.0% -> 95.0%" in text
    assert text.endswith("met")
    assert describe_learning({OURS: arrived, TRL: arrived}).endswith("MISSED")
    assert describe_learning({OURS: lost, TRL: lost}).endswith("neither arrived")

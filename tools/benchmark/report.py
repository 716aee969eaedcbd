"""What is said of the measurements: a table, and the whole as JSON."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tools.benchmark.floor import step_flops
from tools.benchmark.learning import Curve
from tools.benchmark.measure import OURS, OURS_BF16, TRL, Measurement

GIB = 2**30
SPEEDUP, OVER_FLOOR = "TRL's step / ours", "our step / counted floor"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One ratio and what is aimed at."""

    workload: str
    what: str
    value: float
    goal: float | None
    at_least: bool
    """Whether the goal is the least value, or the largest."""

    @property
    def is_met(self) -> bool | None:
        """None where nothing is aimed at."""
        if self.goal is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def __str__(self) -> str:
        if self.goal is None:
            return f"{self.workload:4} {self.what:48} {self.value:7.2f}"
        sign, verdict = (">=" if self.at_least else "<="), ("met" if self.is_met else "MISSED")
        return f"{self.workload:4} {self.what:48} {self.value:7.2f}   goal {sign} {self.goal:g}: {verdict}"


def figures(measurement: Measurement) -> list[Figure]:
    """The ratios of one workload."""
    goals, name = measurement.workload.goals, measurement.workload.name
    memory = measurement.peak_bytes(OURS)
    rows = [
        (SPEEDUP, measurement.median_ratio(TRL, OURS), goals.speedup, True),
        (OVER_FLOOR, measurement.floor_ratio, goals.floor, False),
        ("our peak memory / TRL's", memory / measurement.peak_bytes(TRL), goals.memory, False),
        ("our peak memory / process with optimizer state", memory / measurement.resident_bytes, goals.resident, False),
    ]
    if measurement.rollouts:
        rows.append(("our tokens/s / transformers' generate", measurement.rollout_ratio, goals.rollout, True))
    if OURS_BF16 in measurement.steps:
        rows.append(("our fp32 step / our bf16 step", measurement.median_ratio(OURS, OURS_BF16), goals.bf16, True))
    return [
        Figure(workload=name, what=what, value=value, goal=goal, at_least=at_least)
        for what, value, goal, at_least in rows
    ]


def describe(measurement: Measurement) -> str:
    """Medians, their ranges, the floor and the ratios of one workload, to be read."""
    workload = measurement.workload
    lines = [
        f"{workload.name}: {workload.num_prompts} x {workload.prompt_tokens}-token prompts, G={workload.group_size}, "
        f"{'up to ' if workload.is_ragged else ''}{workload.max_new_tokens} new, beta={workload.kl_coefficient:g}"
    ]
    for name, reports in measurement.steps.items():
        seconds = sorted(report.seconds for report in reports)
        lines.append(
            f"  {name:12} {statistics.median(seconds):8.3f} s/step ({seconds[0]:.3f} .. {seconds[-1]:.3f}), "
            f"peak {measurement.peak_bytes(name) / GIB:.2f} GiB"
        )
    lines.append(
        f"  {'floor':12} {measurement.floor_seconds:8.3f} s/step: {measurement.median_flops / 1e9:.1f} GFLOP at "
        f"{measurement.rate / 1e9:.1f} GFLOP/s"
    )
    lines += [f"  {name}: {_phases(measurement, name)}" for name in measurement.steps if name != TRL]
    return "\n".join([*lines, *map(str, figures(measurement))])


def describe_learning(curves: Mapping[str, Curve]) -> str:
    """How long each framework trained, and the ratio."""
    lines = ["quickstart: training time to 90 % of the held-out problems, the same warm start"]
    for name, curve in curves.items():
        lines.append(
            f"  {name:12} {curve.seconds[-1]:8.1f} s, {curve.updates[-1]} updates, "
            f"accuracy {curve.accuracies[0]:.1%} -> {curve.accuracies[-1]:.1%}"
        )
    if not any(curve.has_arrived for curve in curves.values()):
        return "\n".join([*lines, "  neither arrived"])
    ratio = curves[OURS].seconds_to_target / curves[TRL].seconds_to_target
    figure = Figure(workload="quickstart", what="our seconds / TRL's", value=ratio, goal=0.5, at_least=False)
    return "\n".join([*lines, str(figure)])


def as_json(measurements: Sequence[Measurement], conditions: dict[str, Any]) -> dict[str, Any]:
    """Everything, for other programs."""
    return {
        "conditions": conditions,
        "workloads": [
            {
                "workload": asdict(measurement.workload),
                "frameworks": measurement.frameworks,
                "matmul_flops_per_second": measurement.rate,
                "median_seconds": {name: measurement.median_seconds(name) for name in measurement.steps},
                "floor_seconds": measurement.floor_seconds,
                "floor_flops": [
                    asdict(step_flops(measurement.workload, report.lengths)) for report in measurement.steps[OURS]
                ],
                "steps": {name: [asdict(r) for r in reports] for name, reports in measurement.steps.items()},
                "rollouts": {name: [asdict(r) for r in reports] for name, reports in measurement.rollouts.items()},
                "figures": [{**asdict(figure), "is_met": figure.is_met} for figure in figures(measurement)],
            }
            for measurement in measurements
        ],
    }


def _phases(measurement: Measurement, name: str) -> str:
    """The forward pass of an update is its phase; its backward pass and the optimizer are what no phase has."""
    reports = measurement.steps[name]
    phases = [{**r.seconds_by_phase, "rest": r.seconds - sum(r.seconds_by_phase.values())} for r in reports]
    return ", ".join(f"{phase} {statistics.median(seconds[phase] for seconds in phases):.3f} s" for phase in phases[0])

"""The measurement of one workload: rounds in which every framework makes one step, in turn."""

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tools.benchmark.floor import step_flops
from tools.benchmark.machine import multiplies_bf16
from tools.benchmark.model_folder import write_model_folder
from tools.benchmark.protocol import Report, Worker
from tools.benchmark.workloads import Workload

OURS, TRL, OURS_BF16 = "ours", "TRL", "ours, bf16"
WARM_UP = 2
"""Rounds that are not counted: the third step of a process is the first that finds its memory as it left it."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """How it is measured, the same for all workloads."""

    our_python: str
    trl_python: str
    num_rounds: int
    num_threads: int
    is_reduced: bool
    before_round: Callable[[], None]
    """Called while every worker waits; raises where the machine is not quiet."""


@dataclass(kw_only=True)
class Measurement:
    """What was measured of one workload; lists have an entry per round, the same round at the same place."""

    workload: Workload
    frameworks: dict[str, str] = field(default_factory=dict)
    steps: dict[str, list[Report]] = field(default_factory=dict)
    rollouts: dict[str, list[Report]] = field(default_factory=dict)
    rate: float = 0.0
    """Floating-point operations per second of matrix products of the model's shapes, fp32."""
    resident_bytes: int = 0
    """Our process without a model, and weights, gradients, both moments of Adam and the reference in fp32."""

    def median_seconds(self, name: str) -> float:
        """Of a step."""
        return statistics.median(report.seconds for report in self.steps[name])

    def median_ratio(self, slow: str, fast: str) -> float:
        """The median over the rounds of the ratio of two frameworks' seconds per step."""
        pairs = zip(self.steps[slow], self.steps[fast], strict=True)
        return statistics.median(one.seconds / other.seconds for one, other in pairs)

    def peak_bytes(self, name: str) -> int:
        """The most memory that a step took."""
        return max(report.peak_bytes for report in self.steps[name])

    @property
    def floor_seconds(self) -> float:
        """The counted operations of the median step at the measured rate."""
        return self.median_flops / self.rate

    @property
    def median_flops(self) -> float:
        """Of a step, by the lengths that it drew."""
        return statistics.median(step_flops(self.workload, report.lengths).total for report in self.steps[OURS])

    @property
    def floor_ratio(self) -> float:
        """The median over the rounds of our seconds over those of the floor."""
        return statistics.median(
            report.seconds * self.rate / step_flops(self.workload, report.lengths).total for report in self.steps[OURS]
        )

    @property
    def rollout_ratio(self) -> float:
        """The median over the rounds of our tokens per second over those of transformers' `generate`."""
        pairs = zip(self.rollouts[OURS], self.rollouts[TRL], strict=True)
        return statistics.median(_tokens_per_second(ours) / _tokens_per_second(theirs) for ours, theirs in pairs)


def measure(workload: Workload, conditions: Conditions, folder: Path) -> Measurement:
    """Measure a workload.

    Args:
        workload: As it is named; `conditions` may reduce it.
        conditions: Of the whole run.
        folder: For the model.

    Raises:
        BusyMachineError: Somebody else computes.
    """
    actual = workload.reduced() if conditions.is_reduced else workload
    write_model_folder(actual.model, folder, max_positions=actual.prompt_tokens + actual.max_new_tokens)
    measurement = Measurement(workload=actual)
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(_worker(name, workload, conditions, folder)) for name in _frameworks(workload)
        }
        hellos = {name: worker.wait_until_ready() for name, worker in workers.items()}
        measurement.frameworks = {name: hello.framework for name, hello in hellos.items()}
        measurement.resident_bytes = hellos[OURS].base_bytes + 5 * 4 * hellos[OURS].num_parameters
        _steps(workers, conditions, measurement)
        if workload.goals.rollout is not None:
            _rollouts(workers, conditions, measurement)
    return measurement


def _steps(workers: dict[str, Worker], conditions: Conditions, measurement: Measurement) -> None:
    """The first rounds warm everybody up."""
    num_tokens = actual_tokens(measurement.workload)
    for round_number in range(-WARM_UP, conditions.num_rounds):
        conditions.before_round()
        reports: dict[str, Report] = {}
        for name, worker in workers.items():
            reports[name] = worker.ask("step", reports[OURS].lengths if OURS in reports else ())
        if reports[TRL].lengths != reports[OURS].lengths:
            raise RuntimeError(f"The completions differ: {reports[TRL].lengths} and {reports[OURS].lengths}.")
        measurement.rate = max(measurement.rate, workers[OURS].ask("rate", num_tokens))
        if round_number >= 0:
            for name, report in reports.items():
                measurement.steps.setdefault(name, []).append(report)


def _rollouts(workers: dict[str, Worker], conditions: Conditions, measurement: Measurement) -> None:
    for round_number in range(-1, conditions.num_rounds):
        conditions.before_round()
        ours = workers[OURS].ask("rollout")
        theirs = workers[TRL].ask("rollout", ours.lengths)
        if round_number >= 0:
            measurement.rollouts.setdefault(OURS, []).append(ours)
            measurement.rollouts.setdefault(TRL, []).append(theirs)


def actual_tokens(workload: Workload) -> int:
    """The tokens of an update with completions of full length, each prompt once."""
    completions = workload.num_completions * (workload.max_new_tokens - 1)
    return workload.num_prompts * workload.prompt_tokens + completions


def _frameworks(workload: Workload) -> list[str]:
    return [OURS, TRL] if workload.goals.bf16 is None or not multiplies_bf16() else [OURS, TRL, OURS_BF16]


def _worker(name: str, workload: Workload, conditions: Conditions, folder: Path) -> Worker:
    arguments = [workload.name, str(folder), *(["--reduced"] if conditions.is_reduced else [])]
    if name == OURS_BF16:
        arguments += ["--precision", "bf16-mixed"]
    return Worker(
        "tools.benchmark.trl_worker" if name == TRL else "tools.benchmark.ours",
        python=conditions.trl_python if name == TRL else conditions.our_python,
        arguments=arguments,
        num_threads=conditions.num_threads,
    )


def _tokens_per_second(report: Report) -> float:
    return sum(report.lengths) / report.seconds

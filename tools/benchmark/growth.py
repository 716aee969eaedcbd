"""Measure how our own whole steps grow with one quantity while the others stay.

    python -m tools.benchmark.growth --threads 1 --output runs/growth

The quantities are prompts, tokens of a prompt, completions of a group, and words of the vocabulary; each point is a
process of its own. Beside the seconds of a step stand the operations that the mathematics needs (`floor`), both
relative to the first point: where seconds grow faster than operations, something scales worse than it must. Beside the
peak memory stands what is left of it without the process itself, weights, gradients, both moments of Adam and the
reference: along the vocabulary that must stay flat, but for the at most `MAX_KEPT_LOGITS` logits (and what is made of
them) that are kept while there are so few. Where the machine is busy nothing is measured.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.benchmark import machine
from tools.benchmark.arguments import folder, positive
from tools.benchmark.floor import step_flops
from tools.benchmark.model_folder import write_model_folder
from tools.benchmark.plot import plot_growth
from tools.benchmark.protocol import Worker
from tools.benchmark.series import SERIES, Series
from tools.benchmark.workloads import Workload

_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Point:
    """What was measured at one value of the quantity."""

    value: int
    seconds: float
    """Median per step."""
    flops: int
    """Counted, of a step."""
    peak_bytes: int
    working_bytes: int
    """Of the peak, what is neither the process without a model, nor weights, gradients, moments and reference."""


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What was measured along one quantity."""

    quantity: str
    points: Sequence[Point]

    @property
    def relative_costs(self) -> list[float]:
        """Seconds per counted operation of each point, over those of the first."""
        costs = [point.seconds / point.flops for point in self.points]
        return [cost / costs[0] for cost in costs]

    def __str__(self) -> str:
        lines = [f"{self.quantity:>14}  s/step   GFLOP  s/FLOP  peak MiB  of it working"]
        lines += [
            f"{point.value:14,} {point.seconds:7.3f} {point.flops / 1e9:7.2f} {relative:7.2f} "
            f"{point.peak_bytes / _MIB:9.0f} {point.working_bytes / _MIB:14.0f}"
            for point, relative in zip(self.points, self.relative_costs, strict=True)
        ]
        return "\n".join(lines)


def measure_point(
    value: int, workload: Workload, *, num_steps: int, num_threads: int, before_step: Callable[[], None]
) -> Point:
    """Measure some steps of one workload, after one that warms up.

    Args:
        value: Of the quantity.
        workload: One of `series.POINTS`.
        num_steps: That count.
        num_threads: On which the worker computes.
        before_step: Called while the worker waits; raises where the machine is not quiet.
    """
    with tempfile.TemporaryDirectory() as folder:
        max_positions = workload.prompt_tokens + workload.max_new_tokens
        write_model_folder(workload.model, Path(folder), max_positions=max_positions)
        arguments = [workload.name, folder]
        module = "tools.benchmark.ours"
        with Worker(module, python=sys.executable, arguments=arguments, num_threads=num_threads) as worker:
            hello = worker.wait_until_ready()
            reports = []
            for _ in range(num_steps + 1):
                before_step()
                reports.append(worker.ask("step", ()))
    counted = reports[1:]
    peak = max(report.peak_bytes for report in counted)
    return Point(
        value=value,
        seconds=statistics.median(report.seconds for report in counted),
        flops=step_flops(workload, counted[0].lengths).total,
        peak_bytes=peak,
        working_bytes=peak - hello.base_bytes - 5 * 4 * hello.num_parameters,
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; 1 where the machine is busy."""
    settings = _parser().parse_args(arguments)
    if settings.allow_busy:
        print("The machine may be busy: NO MEASUREMENT, a trial.", flush=True)
    try:
        if not settings.allow_busy:
            machine.require_low_load()
        found = [_measure(SERIES[quantity], settings) for quantity in settings.quantities]
    except machine.BusyMachineError as error:
        print(f"Nothing is claimed: {error}", file=sys.stderr)
        return 1
    _write(found, settings)
    return 0


def _measure(series: Series, settings: argparse.Namespace) -> Growth:
    points = [
        measure_point(
            value,
            workload,
            num_steps=settings.steps,
            num_threads=settings.threads,
            before_step=(lambda: None) if settings.allow_busy else machine.require_quiet,
        )
        for value, workload in (series.reduced() if settings.reduced else series).points.items()
    ]
    growth = Growth(quantity=series.quantity, points=points)
    print(growth, flush=True)
    return growth


def _write(found: Sequence[Growth], settings: argparse.Namespace) -> None:
    described = {
        **machine.describe(),
        "threads": settings.threads,
        "steps": settings.steps,
        "is_reduced": settings.reduced,
        "is_a_measurement": not settings.allow_busy,
    }
    of_quantities = {
        growth.quantity: [
            asdict(point) | {"relative_seconds_per_flop": relative}
            for point, relative in zip(growth.points, growth.relative_costs, strict=True)
        ]
        for growth in found
    }
    written = {"conditions": described, "growth": of_quantities}
    (settings.output / "growth.json").write_text(json.dumps(written, indent=1) + "\n")
    title = f"{described['processor']}, {settings.threads} threads, fp32"
    title += " (trial, no measurement)" if settings.allow_busy else ""
    plot_growth(of_quantities, settings.output / "growth.svg", title=title)
    print(f"Written to {settings.output}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmark.growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quantities", nargs="+", choices=SERIES, default=list(SERIES))
    parser.add_argument("--steps", type=positive, default=3, help="counted steps of each point; one more comes first")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--output", type=folder, default="runs/growth", help="folder of the JSON and the figure")
    parser.add_argument("--reduced", action="store_true", help="the first two points alone, to try the measurement")
    parser.add_argument("--allow-busy", action="store_true", help="go on where the machine is busy, and claim nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""Measure whole training steps of this framework and of TRL, in turn, on one machine.

    python -m tools.benchmark --trl-python .venv-peers/bin/python --output runs/benchmark

Each framework is a process in the middle of its own training loop, in its own environment, with the same weights,
prompts, G, lengths and beta; one at a time is told to make a step. Lengths are those that ours draws; TRL is made to
end its completions at the same positions. TRL keeps all activations (no gradient checkpointing), as ours does, which
is its faster way. Beside the times stands the floor: the operations that the mathematics needs, at the rate at which
this machine multiplies matrices of the model's shapes, measured in the same run. Where the machine is busy nothing is
measured. bf16 compute is measured where the processor multiplies bf16.

With ``quickstart`` among the workloads both also train on the quickstart's task, until 90 % of the held-out problems
are solved. That needs the cold start's policy: `grpo-lightning fit --config configs/quickstart_cold_start.yaml`.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from tools.benchmark import machine, report
from tools.benchmark.arguments import folder, positive, python_with_trl
from tools.benchmark.learning import Curve, learn
from tools.benchmark.measure import Conditions, Measurement, measure
from tools.benchmark.plot import plot_steps
from tools.benchmark.quickstart import MAX_STEPS, POLICY_FOLDER
from tools.benchmark.workloads import WORKLOADS

QUICKSTART = "quickstart"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; 1 where the machine is busy."""
    parser = _parser()
    settings = parser.parse_args(arguments)
    if QUICKSTART in settings.workloads and not POLICY_FOLDER.is_dir():
        parser.error(
            f"--workloads {QUICKSTART}: there is no {POLICY_FOLDER}. Make it with `grpo-lightning fit --config "
            "configs/quickstart_cold_start.yaml`, or name the other workloads alone."
        )
    if settings.allow_busy:
        print("The machine may be busy: NO MEASUREMENT, a trial of the benchmark.", flush=True)
    conditions = Conditions(
        our_python=sys.executable,
        trl_python=settings.trl_python,
        num_rounds=settings.rounds,
        num_threads=settings.threads,
        is_reduced=settings.reduced,
        before_round=(lambda: None) if settings.allow_busy else machine.require_quiet,
    )
    try:
        if not settings.allow_busy:
            machine.require_low_load()
        measurements: list[Measurement] = []
        for name in (name for name in settings.workloads if name in WORKLOADS):
            measurements.append(_measure(name, conditions))
            _write(measurements, {}, settings)
        if QUICKSTART in settings.workloads:
            _write(measurements, _learn(conditions), settings)
    except machine.BusyMachineError as error:
        print(f"Nothing is claimed of what is missing here: {error}", file=sys.stderr)
        return 1
    print(f"Written to {settings.output}")
    return 0


def _measure(name: str, conditions: Conditions) -> Measurement:
    with tempfile.TemporaryDirectory() as folder:
        measurement = measure(WORKLOADS[name], conditions, Path(folder))
    print(report.describe(measurement), flush=True)
    return measurement


def _learn(conditions: Conditions) -> dict[str, Curve]:
    curves = learn(conditions, POLICY_FOLDER, max_updates=5 if conditions.is_reduced else MAX_STEPS)
    print(report.describe_learning(curves), flush=True)
    return curves


def _write(measurements: list[Measurement], curves: dict[str, Curve], settings: argparse.Namespace) -> None:
    """What there is so far: a long run that is cut off has not been in vain."""
    described = {
        **machine.describe(),
        "threads": settings.threads,
        "rounds": settings.rounds,
        "is_reduced": settings.reduced,
        "is_a_measurement": not settings.allow_busy,
    }
    path = settings.output / "benchmark.json"
    written = report.as_json(measurements, described) | {"quickstart": {n: asdict(c) for n, c in curves.items()}}
    path.write_text(json.dumps(written, indent=1) + "\n")
    title = f"{described['processor']}, {settings.threads} threads, fp32" + (
        "" if not settings.allow_busy else " (trial, no measurement)"
    )
    if measurements:
        plot_steps(measurements, settings.output / "benchmark.png", title=title)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--trl-python", type=python_with_trl, required=True, help="the interpreter of TRL's environment"
    )
    parser.add_argument("--workloads", nargs="+", choices=[*WORKLOADS, QUICKSTART], default=[*WORKLOADS, QUICKSTART])
    parser.add_argument("--rounds", type=positive, default=5, help="counted steps of each; two more come first")
    parser.add_argument("--threads", type=positive, default=2, help="of each framework")
    parser.add_argument("--output", type=folder, default="runs/benchmark", help="folder of the JSON and the figure")
    parser.add_argument("--reduced", action="store_true", help="a tenth of the work, to try the benchmark")
    parser.add_argument("--allow-busy", action="store_true", help="go on where the machine is busy, and claim nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())

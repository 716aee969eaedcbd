"""Measure what a rank gets done beside another one, relative to a rank alone.

    python -m tools.benchmark.ranks

Two ranks with one thread each make steps with twice the prompts of a workload (W1), so that each rank has the work of
one; a process alone, with one thread, makes steps of the workload itself. All worlds are there at once, and step in
turn; a round is a step of each. The throughput per rank of a round is the seconds of the process alone over those of
the two ranks. What is missing to 1 is the exchange of gradients, what ranks tell each other of an iteration, waiting
for the slower one, and the cache and memory that two processes share.

Written are ``docs/figures/ranks.json`` and the table in ``docs/scaling.md``. Where the machine is busy, or has fewer
than two cores, nothing is measured.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.benchmark import machine
from tools.benchmark.arguments import positive
from tools.benchmark.model_folder import write_model_folder
from tools.benchmark.protocol import Worker
from tools.benchmark.workloads import WORKLOADS
from tools.marked import with_part

ALONE = "alone"
STRATEGIES = {ALONE: ("auto", 1), "ddp": ("ddp", 2), "fsdp2": ("fsdp2", 2)}
"""Name -> the Trainer's strategy, and the number of ranks."""
AIM = 0.9
WARM_UP = 2
WORKLOAD = "W1"
DOCS = Path(__file__).parents[2] / "docs"
COMMAND = "python -m tools.benchmark.ranks"
NOT_MEASURED = "Not measured yet: `python -m tools.benchmark.ranks` on a quiet machine writes the table here."


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """What was measured of one strategy; lists have an entry per round."""

    strategy: str
    seconds: Sequence[float]
    alone_seconds: Sequence[float]

    @property
    def per_rank(self) -> float:
        """The median over the rounds of a rank's throughput, relative to a process alone."""
        return statistics.median(a / s for a, s in zip(self.alone_seconds, self.seconds, strict=True))


def measure(*, num_rounds: int, is_reduced: bool, before_round: Callable[[], None]) -> list[Throughput]:
    """Measure every strategy, in turn.

    Args:
        num_rounds: That count, after `WARM_UP` others.
        is_reduced: Whether steps are small, to try the measurement.
        before_round: Called while every world waits; raises where the machine is not quiet.
    """
    workload = WORKLOADS[WORKLOAD].reduced() if is_reduced else WORKLOADS[WORKLOAD]
    seconds: dict[str, list[float]] = {name: [] for name in STRATEGIES}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        max_positions = workload.prompt_tokens + workload.max_new_tokens
        write_model_folder(workload.model, Path(folder), max_positions=max_positions)
        workers = {name: stack.enter_context(_worker(name, folder, is_reduced)) for name in STRATEGIES}
        for worker in workers.values():
            worker.wait_until_ready()
        for round_number in range(-WARM_UP, num_rounds):
            before_round()
            for name, worker in workers.items():
                report = worker.ask("step")
                if round_number >= 0:
                    seconds[name].append(report.seconds)
    alone = seconds.pop(ALONE)
    return [
        Throughput(strategy=name, seconds=of_strategy, alone_seconds=alone) for name, of_strategy in seconds.items()
    ]


def _worker(name: str, folder: str, is_reduced: bool) -> Worker:
    strategy, num_ranks = STRATEGIES[name]
    arguments = [WORKLOAD, folder, "--strategy", strategy, "--ranks", str(num_ranks)]
    arguments += ["--reduced"] if is_reduced else []
    return Worker("tools.benchmark.ranks_worker", python=sys.executable, arguments=arguments, num_threads=1)


def table(measured: Mapping[str, Any]) -> str:
    """The figures in Markdown, with what they were measured on.

    Args:
        measured: What is in ``ranks.json``.
    """
    conditions = measured["conditions"]
    rows = [
        f"| {found['strategy']} | {found['alone_median_seconds']:.2f} | {found['median_seconds']:.2f} "
        f"| {found['per_rank']:.2f} | {'met' if found['per_rank'] >= AIM else 'missed'} |"
        for found in measured["throughput"]
    ]
    head = f"| strategy | one rank alone, s/step | two ranks, s/step | throughput per rank | aim: {AIM:g} |"
    return "\n".join(
        [
            head,
            "|---|--:|--:|--:|---|",
            *rows,
            "",
            f"{conditions['processor']}, {conditions['cores']} cores, one thread per rank, "
            f"{conditions['rounds']} rounds, medians ([figures/ranks.json](figures/ranks.json)).",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; 1 where the machine is busy or too small."""
    settings = _parser().parse_args(arguments)
    if settings.allow_busy:
        print("The machine may be busy: NO MEASUREMENT, a trial.", flush=True)
    elif len(os.sched_getaffinity(0)) < 2:
        print("Nothing is claimed: two ranks need two cores.", file=sys.stderr)
        return 1
    try:
        if not settings.allow_busy:
            machine.require_low_load()
        found = measure(
            num_rounds=settings.rounds,
            is_reduced=settings.reduced,
            before_round=(lambda: None) if settings.allow_busy else machine.require_quiet,
        )
    except machine.BusyMachineError as error:
        print(f"Nothing is claimed: {error}", file=sys.stderr)
        return 1
    measured = _described(found, settings)
    print(table(measured))
    (settings.docs / "figures").mkdir(parents=True, exist_ok=True)
    (settings.docs / "figures" / "ranks.json").write_text(json.dumps(measured, indent=1) + "\n")
    page = settings.docs / "scaling.md"
    page.write_text(with_part(page.read_text(), COMMAND, table(measured)))
    return 0


def _described(found: Sequence[Throughput], settings: argparse.Namespace) -> dict[str, Any]:
    return {
        "conditions": {
            **machine.describe(),
            "threads_per_rank": 1,
            "rounds": settings.rounds,
            "is_reduced": settings.reduced,
            "is_a_measurement": not settings.allow_busy,
        },
        "workload": WORKLOAD,
        "aim": AIM,
        "throughput": [
            {
                "strategy": throughput.strategy,
                "per_rank": throughput.per_rank,
                "median_seconds": statistics.median(throughput.seconds),
                "alone_median_seconds": statistics.median(throughput.alone_seconds),
                "seconds": list(throughput.seconds),
                "alone_seconds": list(throughput.alone_seconds),
            }
            for throughput in found
        ],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmark.ranks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=positive, default=9, help=f"counted ones; {WARM_UP} more come first")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of scaling.md and figures/")
    parser.add_argument("--reduced", action="store_true", help="small steps, to try the measurement")
    parser.add_argument("--allow-busy", action="store_true", help="go on where the machine is busy, and claim nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())

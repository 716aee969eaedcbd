"""Where the time of one of our steps goes, by the kind of operation.

    python -m tools.benchmark.profile W1 --threads 2

Runs the workload in this process and profiles its fourth step with torch's profiler, which slows small operations down:
shares are to be read, not seconds against those of the benchmark.
"""

import argparse
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from grpo_lightning.policy import PretrainedPolicy
from tools.benchmark.arguments import positive
from tools.benchmark.model_folder import write_model_folder
from tools.benchmark.ours import EvenSum, RandomPrompts, make_module, make_trainer, serve
from tools.benchmark.protocol import Channel, FinishedError, Report
from tools.benchmark.workloads import WORKLOADS, Workload

WARM_UP = 3
KINDS = {
    "matrix products": re.compile(r"(bmm|mm|addmm|baddbmm)_?"),
    "attention": re.compile(r"_?scaled_dot_product.*"),
    "copies and gathers": re.compile(r"copy_|cat|index(_select)?|gather|clone|scatter_add_|fill_|zero_"),
    "fused optimizer": re.compile(r"_fused_adamw_"),
}
"""The operations of each kind, by their names."""
REST = "norms, activations, rotations, sampling, and what calls all of it"


def kind_of(operation: str) -> str:
    """The kind of an operation of torch's profiler, as ``aten::mm``."""
    name = operation.removeprefix("aten::")
    return next((kind for kind, pattern in KINDS.items() if pattern.fullmatch(name)), REST)


def shares(seconds_by_operation: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The share of each kind in the time of all operations, the largest first."""
    totals = dict.fromkeys((*KINDS, REST), 0.0)
    for operation, seconds in seconds_by_operation:
        totals[kind_of(operation)] += seconds
    total = sum(totals.values())
    return {kind: totals[kind] / total for kind in sorted(totals, key=lambda kind: -totals[kind])}


class ProfiledStep(Channel):
    """Takes the place of the benchmark's coordinator: some steps, of which the last is profiled."""

    def __init__(self) -> None:
        self.handlers: dict[str, Any] = {}
        self.profile = profile(activities=[ProfilerActivity.CPU])
        self.reports: list[Report] = []

    def say(self, message: Any) -> None:
        """Keep what a step reports."""
        if isinstance(message, Report):
            self.reports.append(message)

    def wait_for_step(self) -> None:
        """Go on at once; stop after the profiled one."""
        if len(self.reports) == WARM_UP:
            self.profile.__enter__()
        if len(self.reports) > WARM_UP:
            self.profile.__exit__(None, None, None)
            raise FinishedError


def profiled(workload: Workload, *, precision: str) -> ProfiledStep:
    """Train until the profiled step is over."""
    channel = ProfiledStep()
    with tempfile.TemporaryDirectory() as folder:
        write_model_folder(workload.model, Path(folder), max_positions=workload.prompt_tokens + workload.max_new_tokens)
        module = make_module(workload, PretrainedPolicy(folder), is_fused=precision == "32-true")
        serve(make_trainer(channel, EvenSum(), {}, precision=precision), module, RandomPrompts(workload))
    return channel


def main(arguments: list[str] | None = None) -> None:
    """Profile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--reduced", action="store_true", help="a tenth of the work, to try the profile")
    settings = parser.parse_args(arguments)
    torch.set_num_threads(settings.threads)
    workload = WORKLOADS[settings.workload]
    step = profiled(workload.reduced() if settings.reduced else workload, precision=settings.precision)
    of_operations = [(event.key, event.self_cpu_time_total / 1e6) for event in step.profile.key_averages()]
    plain = step.reports[WARM_UP - 1].seconds
    print(f"{settings.workload}, {settings.precision}, {settings.threads} threads: {plain:.2f} s for the step before")
    print("\n".join(f"  {share:5.1%}  {kind}" for kind, share in shares(of_operations).items()))


if __name__ == "__main__":
    main()

"""What the experiments share: a command that trains every arm from every seed, and the file of numbers.

Each line of the file's ``runs`` is one run, so that a run more is a line more.
"""

import json
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch

from tools.experiments.training import Curves

SEEDS = (1, 2, 3, 4, 5)
"""Those that are reported. Settings were chosen on others, from 101 upwards."""
FIGURES = Path("docs/figures")
PACKAGES = ("grpo_lightning", "lightning", "torch", "transformers")


class Train(Protocol):
    """Trains one arm from one seed."""

    def __call__(self, arm: str, *, seed: int, num_updates: int) -> Curves:
        """What happened on the way."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One coordinate system of a figure: every run's `y` over `x`, and each arm's mean."""

    x: str
    y: str
    label: str
    """Of the y axis."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """In every seed, the outcome of `larger` is expected to exceed that of `smaller` (None: to exceed 0)."""

    larger: str
    smaller: str | None = None


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A claim about two or three arms, which differ in one part.

    Args:
        name: Of its files.
        arms: What is compared.
        num_updates: Optimizer steps of a run.
        train: See `Train`.
        outcome: The one number of a run that the claim is about.
        outcome_label: What it is, for the table.
        comparisons: What the claim says of it.
        panels: The figure.
    """

    name: str
    arms: tuple[str, ...]
    num_updates: int
    train: Train
    outcome: Callable[[Curves], float]
    outcome_label: str
    comparisons: tuple[Comparison, ...]
    panels: tuple[Panel, ...]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One arm from one seed."""

    arm: str
    seed: int
    seconds: float
    """Of the wall clock, on whatever else the machine was doing."""
    curves: Curves


def main(experiment: Experiment, arguments: Sequence[str] | None = None) -> None:
    """The command of an experiment: trains, and writes ``<folder>/<name>.json`` after every run."""
    parser = ArgumentParser(prog=f"python -m tools.experiments.{experiment.name}")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--updates", type=int, default=experiment.num_updates, help="optimizer steps of each run")
    parser.add_argument("--folder", type=Path, default=FIGURES, help="gets the file of numbers")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # then sums are added in one order
    runs: list[Run] = []
    for seed in options.seeds:
        for arm in experiment.arms:
            start = time.perf_counter()
            curves = experiment.train(arm, seed=seed, num_updates=options.updates)
            seconds = round(time.perf_counter() - start, 1)
            runs.append(Run(arm=arm, seed=seed, seconds=seconds, curves=curves))
            write(options.folder / f"{experiment.name}.json", experiment, runs)
            print(f"seed {seed}, {arm}: {experiment.outcome(curves):.4g} ({seconds} s)", file=sys.stderr, flush=True)


def write(path: Path, experiment: Experiment, runs: Sequence[Run]) -> None:
    """Write the file of numbers, with the versions that made them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = {name: version(name) for name in PACKAGES}
    lines = ",\n".join(f"  {json.dumps(asdict(run))}" for run in runs)
    head = json.dumps({"experiment": experiment.name, "versions": versions})
    path.write_text(f'{head[:-1]}, "runs": [\n{lines}\n]}}\n')


def read(path: Path) -> list[Run]:
    """The runs of a file of numbers."""
    return [Run(**run) for run in json.loads(path.read_text())["runs"]]

"""Redraws every figure from the committed numbers, and prints the tables of ``docs/experiments.md``."""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tools.experiments import clip_higher, dynamic_sampling, length_bias, sampler_mismatch
from tools.experiments.experiment import FIGURES, Comparison, Experiment, Panel, Run, read
from tools.experiments.outcome import sign_test

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXPERIMENTS = (
    length_bias.EXPERIMENT,
    clip_higher.EXPERIMENT,
    sampler_mismatch.EXPERIMENT,
    dynamic_sampling.EXPERIMENT,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw ``<name>.svg`` beside ``<name>.json``, and print the table."""
    parser = ArgumentParser(prog="python -m tools.experiments.figures")
    parser.add_argument("--folder", type=Path, default=FIGURES, help="has the files of numbers")
    folder = parser.parse_args(arguments).folder
    for experiment in EXPERIMENTS:
        runs = read(folder / f"{experiment.name}.json")
        draw(experiment, runs, folder / f"{experiment.name}.svg")
        print(f"{experiment.name}\n\n{table(experiment, runs)}\n")


def table(experiment: Experiment, runs: Sequence[Run]) -> str:
    """The outcome of every run, and the sign test of each comparison, in Markdown."""
    outcomes = {(run.arm, run.seed): experiment.outcome(run.curves) for run in runs}
    seeds = sorted({run.seed for run in runs})
    rows = [[arm, *(f"{outcomes[arm, seed]:.3g}" for seed in seeds)] for arm in experiment.arms]
    lines = [[experiment.outcome_label, *(f"seed {seed}" for seed in seeds)], ["---", *["--:"] * len(seeds)], *rows]
    claims = [_verdict(comparison, outcomes, seeds) for comparison in experiment.comparisons]
    return "\n".join(
        ["| " + " | ".join(line) + " |" for line in lines] + [line for claim in claims for line in ("", claim)]
    )


def _verdict(comparison: Comparison, outcomes: dict[tuple[str, int], float], seeds: Sequence[int]) -> str:
    larger, smaller = comparison.larger, comparison.smaller
    pairs = [(outcomes[larger, seed], 0.0 if smaller is None else outcomes[smaller, seed]) for seed in seeds]
    differences = [float(a > b) - float(a < b) for a, b in pairs]  # infinite outcomes have no difference
    share = f"{sum(difference > 0 for difference in differences)} of {len(seeds)}"
    return f"{larger} > {smaller or 0}: {share} seeds, one-sided sign test p = {sign_test(differences):.3f}."


def draw(experiment: Experiment, runs: Sequence[Run], path: Path) -> None:
    """Every run as a thin line, and each arm's mean as a thick one."""
    import matplotlib  # of the extra `figures`

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = experiment.name  # the same numbers give the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(experiment.panels), figsize=(4.5 * len(experiment.panels), 3), squeeze=False, layout="constrained"
    )
    for panel, ax in zip(experiment.panels, axes[0], strict=True):
        for number, arm in enumerate(experiment.arms):
            _draw_arm(ax, panel, [run for run in runs if run.arm == arm], arm, f"C{number}")
        ax.set(xlabel="updates", ylabel=panel.label)
        ax.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _draw_arm(ax: "Axes", panel: Panel, runs: Sequence[Run], arm: str, color: str) -> None:
    lines = [run.curves[panel.y] for run in runs]
    x = runs[0].curves[panel.x]
    for y in lines:
        ax.plot(x, y, color=color, alpha=0.3, linewidth=0.7)
    ax.plot(x, [sum(values) / len(values) for values in zip(*lines, strict=True)], color=color, label=arm)


if __name__ == "__main__":
    main()

"""The seconds per step as a figure. Needs matplotlib: the extra `figures`."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

from tools.benchmark.measure import OURS, TRL, Measurement


def plot_steps(measurements: Sequence[Measurement], path: Path, *, title: str) -> None:
    """Draw a pair of bars per workload, and the floor as a line across each.

    Args:
        measurements: One per workload.
        path: Of the image.
        title: Above it: the conditions.
    """
    mpl.use("Agg")
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    places = range(len(measurements))
    for offset, name in ((-0.2, TRL), (0.2, OURS)):
        axes.bar([p + offset for p in places], [m.median_seconds(name) for m in measurements], width=0.4, label=name)
    axes.hlines(
        [m.floor_seconds for m in measurements],
        [p - 0.4 for p in places],
        [p + 0.4 for p in places],
        colors="black",
        label="counted floor",
    )
    axes.set_yscale("log")
    axes.set_ylabel("seconds per step, median")
    axes.set_xticks(list(places), [m.workload.name for m in measurements])
    axes.set_title(title, fontsize="small")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)

"""The measurements as figures. They need matplotlib: the extra `figures`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

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


def plot_growth(growth: Mapping[str, Sequence[Mapping[str, float]]], path: Path, *, title: str) -> None:
    """Draw the seconds per step against each quantity, and the counted operations scaled to the first point.

    Along the vocabulary the working memory is drawn as well, on an axis of its own.

    Args:
        growth: The points of each quantity, as `growth` writes them.
        path: Of the image.
        title: Above it: the conditions.
    """
    mpl.use("Agg")
    figure, all_axes = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    for axes, (quantity, points) in zip(all_axes.flat, growth.items(), strict=False):
        values = [point["value"] for point in points]
        scale = points[0]["seconds"] / points[0]["flops"]
        axes.loglog(values, [point["seconds"] for point in points], marker="o", label="measured")
        axes.loglog(values, [scale * point["flops"] for point in points], "k--", label="counted operations, scaled")
        axes.set_xticks(values, [f"{value:,}" for value in values])
        axes.minorticks_off()
        axes.set_xlabel(quantity.replace("_", " "))
        axes.set_ylabel("seconds per step, median")
        axes.legend(loc="upper left", fontsize="small")
        if quantity == "vocabulary":
            _draw_memory(axes.twinx(), values, [point["working_bytes"] / 2**20 for point in points])
    for axes in all_axes.flat[len(growth) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize="small")
    figure.savefig(path)
    plt.close(figure)


def _draw_memory(axes: Axes, values: Sequence[float], mebibytes: Sequence[float]) -> None:
    axes.plot(values, mebibytes, color="tab:red", marker="s", label="working memory")
    axes.set_ylim(0, 2 * max(mebibytes))
    axes.set_ylabel("MiB at the peak, without process,\nweights, gradients, moments, reference", color="tab:red")
    axes.legend(loc="lower right", fontsize="small")

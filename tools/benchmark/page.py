"""The figures of the benchmark and of growth as tables in Markdown, from ``docs/figures``.

python -m tools.benchmark.page
"""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.benchmark.measure import OURS, TRL
from tools.benchmark.report import OVER_FLOOR, SPEEDUP

FIGURES = Path(__file__).parents[2] / "docs" / "figures"
_GIB, _MIB = 2**30, 2**20


def steps(benchmark: Mapping[str, Any]) -> str:
    """Seconds and memory of each framework's step, and the floor.

    Args:
        benchmark: What ``python -m tools.benchmark`` wrote.
    """
    head = [
        "workload",
        "pairs",
        "TRL, s/step",
        "ours, s/step",
        "TRL / ours",
        "floor, s/step",
        "ours / floor",
        "TRL, GiB",
    ]
    return _table([*head, "ours, GiB"], (_step(measured) for measured in benchmark["workloads"]))


def goals(benchmark: Mapping[str, Any]) -> str:
    """What was aimed at, and what was reached."""
    figures = [figure for measured in benchmark["workloads"] for figure in measured["figures"]]
    aimed = [figure for figure in figures if figure["goal"] is not None]
    return _table(
        ["workload", "ratio", "aim", "measured", ""],
        (
            [
                figure["workload"],
                figure["what"],
                f"{'≥' if figure['at_least'] else '≤'} {figure['goal']:g}",
                f"{figure['value']:.2f}",
                "met" if figure["is_met"] else "missed",
            ]
            for figure in aimed
        ),
    )


def phases(benchmark: Mapping[str, Any]) -> str:
    """Where our step goes: seconds, and the floor of each phase at the same rate of products."""
    return _table(
        ["workload", "rollout", "its floor", "reference", "its floor", "update", "its floor"],
        (_phases(measured) for measured in benchmark["workloads"]),
    )


def learning(benchmark: Mapping[str, Any]) -> str:
    """How long each framework trained on the quickstart's task, and what it could after each update."""
    curves = benchmark["quickstart"]
    return _table(
        ["framework", "seconds", "updates", "held-out accuracy after each"],
        (
            [
                name,
                f"{curve['seconds'][-1]:.2f}",
                str(curve["updates"][-1]),
                ", ".join(map(_percent, curve["accuracies"])),
            ]
            for name, curve in curves.items()
        ),
    )


def growth(measured: Mapping[str, Any], quantity: str) -> str:
    """How a step grows along one quantity.

    Args:
        measured: What ``python -m tools.benchmark.growth`` wrote.
        quantity: One of its series.
    """
    return _table(
        [quantity, "s/step", "GFLOP", "s/FLOP over the first", "working memory, MiB"],
        (
            [
                f"{point['value']:,}",
                f"{point['seconds']:.2f}",
                f"{point['flops'] / 1e9:.1f}",
                f"{point['relative_seconds_per_flop']:.2f}",
                f"{point['working_bytes'] / _MIB:.0f}",
            ]
            for point in measured["growth"][quantity]
        ),
    )


def tables(folder: Path = FIGURES) -> Iterator[str]:
    """All of them."""
    benchmark = json.loads((folder / "benchmark.json").read_text())
    yield from (steps(benchmark), goals(benchmark), phases(benchmark))
    if benchmark["quickstart"]:
        yield learning(benchmark)
    grown = json.loads((folder / "growth.json").read_text())
    yield from (growth(grown, quantity) for quantity in grown["growth"])


def _step(measured: Mapping[str, Any]) -> list[str]:
    figures = {figure["what"]: figure["value"] for figure in measured["figures"]}
    peaks = {name: max(step["peak_bytes"] for step in measured["steps"][name]) / _GIB for name in (TRL, OURS)}
    return [
        measured["workload"]["name"],
        str(len(measured["steps"][OURS])),
        f"{measured['median_seconds'][TRL]:.2f}",
        f"{measured['median_seconds'][OURS]:.2f}",
        f"{figures[SPEEDUP]:.2f}",
        f"{measured['floor_seconds']:.2f}",
        f"{figures[OVER_FLOOR]:.2f}",
        f"{peaks[TRL]:.2f}",
        f"{peaks[OURS]:.2f}",
    ]


def _phases(measured: Mapping[str, Any]) -> list[str]:
    """An update's backward pass and optimizer are outside of every named phase: it has what the others leave."""
    ours, rate = measured["steps"][OURS], measured["matmul_flops_per_second"]

    def seconds(name: str) -> float:
        return statistics.median(step["seconds_by_phase"].get(name, 0.0) for step in ours)

    def floor(*names: str) -> float:
        return statistics.median(sum(flops[name] for name in names) for flops in measured["floor_flops"]) / rate

    rollout, prepare = seconds("generate"), seconds("prepare")
    update = measured["median_seconds"][OURS] - rollout - prepare - seconds("score")
    values = [rollout, floor("prefill", "decode"), prepare, floor("reference"), update, floor("update")]
    return [measured["workload"]["name"], *(f"{value:.2f}" for value in values)]


def _percent(share: float) -> str:
    return f"{share:.0%}"


def _table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print("\n\n".join(tables()))

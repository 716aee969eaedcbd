"""The figures of the engines as tables of docs/engines.md: ``python -m tools.engines.page``."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.marked import with_part

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "engines.md"


def throughput(found: Mapping[str, Any]) -> str:
    """What each engine makes of vLLM's own rate.

    Args:
        found: What ``tools.engines.throughput`` wrote.
    """
    rows = [
        [
            engine,
            f"{figures['raw_tokens_per_second']:.0f}",
            f"{figures['tokens_per_second']:.0f}",
            f"{figures['share_of_raw']:.3f}",
            f"{figures['share_of_raw_without_sync']:.3f}",
            f"{figures['sync_seconds']:.2f}",
        ]
        for engine, figures in found["engines"].items()
    ]
    head = ["engine", "vLLM alone, tokens/s", "ours, tokens/s", "share", "share where nothing is sent", "sync, s"]
    return _table(head, rows)


def learning(found: Mapping[str, Any]) -> str:
    """What is learned with each engine.

    Args:
        found: What ``tools.engines.learning`` wrote.
    """
    rows = [
        [
            engine,
            ", ".join(f"{run['accuracy']:.1%}" for run in runs),
            f"{max(run['mean_difference'] for run in runs):.1e}",
            f"{max(run['largest_mean_difference'] for run in runs):.1e}",
        ]
        for engine, runs in found["runs"].items()
    ]
    head = ["engine", "held-out accuracy, by seed", "mean difference of log-probs", "largest of an iteration"]
    return _table(head, rows)


def overlap(found: Mapping[str, Any]) -> str:
    """What drawing ahead saves.

    Args:
        found: What ``tools.engines.overlap`` wrote.
    """
    compared = found["compared"]
    head = ["rollout over the rest of a step", "in turn, s/iteration", "ahead, s/iteration", "shorter by"]
    row = [f"{compared['generate_over_rest']:.2f}", f"{compared['in turn']:.2f}", f"{compared['ahead']:.2f}"]
    return _table(head, [[*row, f"{compared['fall']:.0%}"]])


PARTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "throughput": throughput,
    "learning": learning,
    "overlap": overlap,
}
"""Of each command ``tools.engines.X`` its table."""


def file_of(name: str) -> Path:
    """Where a command writes its figures."""
    return DOCS / "figures" / f"engines_{name}.json"


def command_of(name: str) -> str:
    """How it is called."""
    return f"python -m tools.engines.{name}"


def written(name: str) -> str:
    """What stands on the page of a command: its table with the conditions, or that there is none."""
    file = file_of(name)
    if not file.exists():
        return f"Not measured yet: `{command_of(name)}`, then `python -m tools.engines.page`, write the table here."
    found = json.loads(file.read_text())
    conditions = found["conditions"]
    cores = f"{conditions['cores']} core{'s' if conditions['cores'] > 1 else ''}"
    where = f"{conditions['processor']}, {cores} ([figures/{file.name}](figures/{file.name}))."
    return f"{PARTS[name](found)}\n\n{where}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    for part in PARTS:
        PAGE.write_text(with_part(PAGE.read_text(), command_of(part), written(part)))

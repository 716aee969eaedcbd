"""The parity table of the strategies, from what `make test-strategies-all` wrote, into docs/strategies.md.

python -m tools.strategy_table
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.marked import with_part

DOCS = Path(__file__).parents[1] / "docs"
FILE, PAGE = DOCS / "figures" / "strategies.json", DOCS / "strategies.md"
COMMAND = "python -m tools.strategy_table"
WIDTHS = {"accumulate": 1, "trained": 4, "layout": 13}
"""Of the settings of a check."""
NOT_APPLICABLE = "n/a"
PACKAGES = ("torch", "lightning", "deepspeed", "transformers", "peft")
NOT_MEASURED = "Not there yet: `make test-strategies-all`, then `python -m tools.strategy_table`, write the table here."

Row = Mapping[str, Any]
"""A cell: its strategy, ranks, check and settings, and either `measures` or `why_not`."""


def lines(rows: Iterable[Row]) -> Iterator[str]:
    """A line for each cell: what was measured beside what is allowed, or why it does not apply."""
    for row in rows:
        settings = " ".join(f"{row.get(column, ''):<{width}}" for column, width in WIDTHS.items())
        yield f"{row['strategy']:11} {row['ranks']}  {row['check']:20} {settings}  {_found(row)}"


def cell_of(row: Row) -> dict[str, Any]:
    """What was run, without what came of it."""
    return {key: value for key, value in row.items() if key not in ("measures", "why_not")}


def missed(rows: Iterable[Row]) -> list[Row]:
    """The cells that are off, or have come to nothing."""
    ran = [row for row in rows if "why_not" not in row]
    return [row for row in ran if not row["measures"] or not all(measure["is_met"] for measure in row["measures"])]


def page(rows: Sequence[Row]) -> str:
    """A line for each strategy and number of ranks, in Markdown: the worst over all cells."""
    kinds = list(dict.fromkeys((row["check"], m["name"]) for row in rows for m in row.get("measures", ())))
    head = ["strategy", "ranks", "cells", *(f"{check}: {name}" for check, name in kinds)]
    table = [head, ["---", *["--:"] * (len(head) - 1)], ["allowed", "", "", *(_allowed(rows, kind) for kind in kinds)]]
    for strategy, ranks in dict.fromkeys((row["strategy"], row["ranks"]) for row in rows):
        mine = [row for row in rows if (row["strategy"], row["ranks"]) == (strategy, ranks)]
        ran = [row for row in mine if "why_not" not in row]
        if ran:
            table.append([strategy, str(ranks), str(len(ran)), *(_worst(ran, kind) for kind in kinds)])
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def reasons(rows: Sequence[Row]) -> str:
    """Why cells do not apply, and how many."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "why_not" in row:
            found.setdefault((row["check"], row["why_not"]), []).append(row)
    return "\n".join(f"* {check}, {_places(cells)}: {why}." for (check, why), cells in found.items())


def _found(row: Row) -> str:
    if "why_not" in row:
        return f"{NOT_APPLICABLE}: {row['why_not']}"
    measures = (
        f"{m['name']} {m['value']:.1e} {'<=' if m['is_met'] else '> MISSED'} {m['tolerance']:g}"
        for m in row["measures"]
    )
    return ", ".join(measures) or "MISSED: it did not come to its end"


def _measured(rows: Sequence[Row], kind: tuple[str, str]) -> list[Mapping[str, Any]]:
    return [m for row in rows for m in row.get("measures", ()) if (row["check"], m["name"]) == kind]


def _allowed(rows: Sequence[Row], kind: tuple[str, str]) -> str:
    return " or ".join(f"{tolerance:g}" for tolerance in sorted({m["tolerance"] for m in _measured(rows, kind)}))


def _worst(rows: Sequence[Row], kind: tuple[str, str]) -> str:
    found = [m["value"] for m in _measured(rows, kind)]
    if not found:
        return NOT_APPLICABLE
    return f"{max(found):.1e}" if max(found) else "0"


def _places(rows: Sequence[Row]) -> str:
    """Which strategies, on how many ranks."""
    strategies = list(dict.fromkeys(row["strategy"] for row in rows))
    ranks = sorted({row["ranks"] for row in rows})
    return f"{' and '.join(strategies)} on {' and '.join(map(str, ranks))}"


def written(measured: Mapping[str, Any]) -> str:
    """What stands on the page: the table, where it was made, and what does not apply.

    Args:
        measured: What is in ``strategies.json``.
    """
    conditions, rows = measured["conditions"], measured["rows"]
    ran = [row for row in rows if "why_not" not in row]
    versions = ", ".join(f"{name} {conditions[name]}" for name in PACKAGES)
    return "\n\n".join(
        [
            page(rows),
            f"{len(ran)} cells that ran, {len(missed(ran))} missed, and {len(rows) - len(ran)} that do not apply. "
            f"{conditions['processor']}, {conditions['cores']} cores, {versions} "
            "([figures/strategies.json](figures/strategies.json)).",
            "What does not apply, and why:",
            reasons(rows),
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(with_part(PAGE.read_text(), COMMAND, written(json.loads(FILE.read_text()))))

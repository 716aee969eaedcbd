"""The parity table of the strategies, printed at the end of a run and written where `--strategy-table` says."""

import json
from importlib.metadata import version
from pathlib import Path

from strategies.cells import CELLS

from tools.benchmark.machine import describe
from tools.strategy_table import PACKAGES, cell_of, lines, missed


def pytest_addoption(parser):
    parser.addoption("--strategy-table", type=Path, help="where to write the parity table of the strategies, as JSON")


def pytest_terminal_summary(terminalreporter, config):
    reports = [report for of_outcome in terminalreporter.stats.values() for report in of_outcome]
    rows = [
        value
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == "strategy_row"
    ]
    if not rows:
        return
    order = [cell.row for cell in CELLS]
    rows.sort(key=lambda row: order.index(cell_of(row)))
    terminalreporter.section("strategies against one process")
    for line in lines(rows):
        terminalreporter.write_line(line)
    terminalreporter.write_line(f"{len(rows)} cells, {len(missed(rows))} missed")
    if path := config.getoption("--strategy-table"):
        conditions = {**describe(), **{name: version(name) for name in PACKAGES}}
        path.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")

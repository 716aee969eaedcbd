"""Writes `docs/lightning.md` from what the tests of Lightning's own parts see: `python -m tools.lightning_page`."""

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from stock import matrix  # noqa: E402 - tests are no package


class Rows:
    """Takes from each test the row that it tells."""

    def __init__(self) -> None:
        self.rows: list[matrix.Row] = []

    def pytest_configure(self, config: Any) -> None:
        """Take the name by which the tests know that the page is being written."""
        config.pluginmanager.register(object(), matrix.WRITER)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called by pytest after each phase of a test."""
        if report.when == "call":
            self.rows += [matrix.Row(*value) for name, value in report.user_properties if name == "row"]


def main() -> None:
    """Run the tests, and write the page if all of them pass."""
    rows, folder = Rows(), ROOT / "tests/stock"
    options = ["-q", "-m", "", "--rootdir", str(ROOT), "--ignore", str(folder / "test_page.py")]
    if pytest.main([str(folder), *options], plugins=[rows]):
        raise SystemExit("docs/lightning.md is left as it was: a test fails.")
    matrix.PAGE.write_text(matrix.page(rows.rows))
    print(f"{matrix.PAGE}: {len(rows.rows)} parts")


if __name__ == "__main__":
    main()

"""The matrix of `docs/lightning.md`: a row is the claim of one test, with what it has just seen."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/lightning.md"
SECTIONS = ("Callbacks", "Loggers", "Profilers", "Flags of the Trainer")
COLUMNS = "| part | | what was seen |\n|---|---|---|\n"
WRITER = "lightning_page"
"""The name of the plugin that writes the page: while it is there, rows are not compared with it."""

INTRODUCTION = """# Lightning's own parts

Each line below is the claim of one test, with what that test saw: a part of Lightning 2.6, unmodified, in a GRPO run
of a tiny policy in one process on a CPU. *Works* means that it did what it is for. *Refused* means that the run ends
before it begins, with a message that names the setting and what to set in its place. The page is written by
`python -m tools.lightning_page`, which runs these tests (`tests/stock`); a test fails where its line differs. Nothing
is claimed here of GPUs, nor, where it is not said, of several processes.

"""


class Row(NamedTuple):
    """One line of the page."""

    section: str
    part: str
    verdict: str
    seen: str

    @property
    def line(self) -> str:
        return f"| {self.part} | {self.verdict} | {self.seen} |\n"


def shows(section: str, part: str) -> Callable:
    """Marks a test as the one that a row of the page is of."""
    assert section in SECTIONS

    def mark(test: Callable) -> Callable:
        test.part = (section, part)
        return test

    return mark


def parts_of_tests() -> list[tuple[str, str]]:
    """Section and part of every test that is marked."""
    sources = [path.read_text() for path in sorted(Path(__file__).parent.glob("test_*.py"))]
    return [pair for source in sources for pair in re.findall(r'^@shows\("(.*?)", "(.*?)"\)$', source, re.MULTILINE)]


def parts_of_page() -> list[tuple[str, str]]:
    """Section and part of every row of the page."""
    sections = re.split(r"^## (.*)\n", PAGE.read_text(), flags=re.MULTILINE)[1:]
    return [
        (name, part)
        for name, text in zip(sections[::2], sections[1::2], strict=True)
        for part in re.findall(r"^\| (.*?) \| (?:works|refused) \|", text, re.MULTILINE)
    ]


def page(rows: Iterable[Row]) -> str:
    """The whole page."""
    rows = sorted(rows, key=lambda row: row.part.lower())
    tables = [
        f"## {section}\n\n{COLUMNS}" + "".join(row.line for row in rows if row.section == section)
        for section in SECTIONS
    ]
    return INTRODUCTION + "\n".join(tables)

import json

from strategies.cells import CELLS, FEW

from tools import strategy_table
from tools.marked import with_part

PAGE = strategy_table.PAGE.read_text()


def row(strategy, ranks, layout, *measured, tolerance=1e-6):
    """A replay, with what was measured of the gradient."""
    figures = [
        {"name": "gradient", "value": value, "tolerance": tolerance, "is_met": value <= tolerance} for value in measured
    ]
    settings = {"accumulate": 4, "trained": "full", "layout": layout}
    return {"strategy": strategy, "ranks": ranks, "check": "replay", **settings, "measures": figures}


ROWS = [
    row("ddp", 2, "padded", 2e-7),
    row("ddp", 2, "packed", 3e-7),
    row("deepspeed_3", 2, "padded", 6e-6, tolerance=5e-6),
    row("deepspeed_3", 4, "padded"),
    {"strategy": "single", "ranks": 2, "check": "memory", "why_not": "one process is one rank"},
    {"strategy": "single", "ranks": 4, "check": "memory", "why_not": "one process is one rank"},
]


def test_a_cell_is_a_line():
    assert list(strategy_table.lines(ROWS)) == [
        "ddp         2  replay               4 full padded         gradient 2.0e-07 <= 1e-06",
        "ddp         2  replay               4 full packed         gradient 3.0e-07 <= 1e-06",
        "deepspeed_3 2  replay               4 full padded         gradient 6.0e-06 > MISSED 5e-06",
        "deepspeed_3 4  replay               4 full padded         MISSED: it did not come to its end",
        "single      2  memory                                     n/a: one process is one rank",
        "single      4  memory                                     n/a: one process is one rank",
    ]


def test_what_is_off_and_what_came_to_nothing_is_missed():
    assert strategy_table.missed(ROWS) == ROWS[2:4]


def test_the_page_has_the_worst_of_each_strategy_and_number_of_ranks():
    assert strategy_table.page(ROWS).splitlines() == [
        "| strategy | ranks | cells | replay: gradient |",
        "| --- | --: | --: | --: |",
        "| allowed |  |  | 1e-06 or 5e-06 |",
        "| ddp | 2 | 2 | 3.0e-07 |",
        "| deepspeed_3 | 2 | 1 | 6.0e-06 |",
        "| deepspeed_3 | 4 | 1 | n/a |",
    ]


def test_the_page_has_the_reasons():
    assert strategy_table.reasons(ROWS) == "* memory, single on 2 and 4: one process is one rank."


def test_the_page_says_how_many_cells_there_are():
    assert f"# {len(FEW)} cells:" in PAGE
    assert f"# all {len(CELLS)}," in PAGE


def test_the_page_has_the_committed_table_or_says_that_there_is_none():
    if not strategy_table.FILE.exists():
        assert with_part(PAGE, strategy_table.COMMAND, strategy_table.NOT_MEASURED) == PAGE
        return
    measured = json.loads(strategy_table.FILE.read_text())
    assert with_part(PAGE, strategy_table.COMMAND, strategy_table.written(measured)) == PAGE
    assert [strategy_table.cell_of(row) for row in measured["rows"]] == [cell.row for cell in CELLS]
    assert not strategy_table.missed(measured["rows"])

"""The parity table: every strategy, on 1, 2 and 4 ranks, against one process.

`make test-strategies` runs a few of its cells, `make test-strategies-all` all of them; both print the table.
"""

from collections import defaultdict
from importlib.util import find_spec

import pytest
import replay
import torch
from strategies.cells import CELLS, FEW, RUN, TRAINED

MARKS = {True: (pytest.mark.strategies, pytest.mark.strategies_all), False: pytest.mark.strategies_all}


@pytest.fixture(scope="session")
def told_by_one_process():
    runs = {}

    def get(cell):
        key = repr(cell.check.one_process)
        if key not in runs:
            runs[key] = replay.told(**cell.check.one_process)
        return runs[key]

    return get


@pytest.fixture(scope="session")
def told_by_ranks(request, tmp_path_factory, told_by_one_process):
    """What the ranks of a cell have to tell. One world runs all cells of its strategy that were asked for."""
    asked = defaultdict(list)
    for item in request.session.items:
        cell = item.callspec.params.get("cell") if hasattr(item, "callspec") else None
        if cell and not cell.why_not:
            asked[cell.strategy, cell.ranks].append(cell)
    folders, broken = {}, {}

    def settings(cell, file):
        if not cell.check.has_second_update_from_one:
            return cell.settings
        torch.save(told_by_one_process(cell)["weights"][0], file)
        return {**cell.settings, "second_update_from": str(file)}

    def get(cell):
        world = cell.strategy, cell.ranks
        if world not in folders:
            folder = folders[world] = tmp_path_factory.mktemp("world")
            runs = [settings(other, folder / f"weights.{i}") for i, other in enumerate(asked[world])]
            try:
                replay.in_world(folder, runs, ranks=cell.ranks)
            except AssertionError as error:
                broken[world] = error
        files = [folders[world] / f"run.{asked[world].index(cell)}.{rank}" for rank in range(cell.ranks)]
        if not all(file.exists() for file in files):
            raise broken[world]
        return [torch.load(file) for file in files]

    return get


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="the extra deepspeed is not installed")
@pytest.mark.parametrize("cell", [pytest.param(cell, marks=MARKS[cell in FEW]) for cell in CELLS], ids=str)
def test_ranks_are_one_process(cell, told_by_ranks, told_by_one_process, record_property):
    if cell.why_not:
        record_property("strategy_row", {**cell.row, "why_not": cell.why_not})
        pytest.skip(cell.why_not)
    measures = []
    try:
        of_ranks = told_by_ranks(cell)
        measures = cell.check.measures(cell.strategy, of_ranks, told_by_one_process(cell))
    finally:
        figures = [{**vars(measure), "is_met": measure.is_met} for measure in measures]
        record_property("strategy_row", {**cell.row, "measures": figures})
    assert all(measure.is_met for measure in measures), measures


@pytest.mark.parametrize("trained", TRAINED)
def test_both_clips_act_in_the_run_that_is_compared(trained):
    metrics = replay.told(**RUN, **TRAINED[trained])["metrics"]
    assert all(of_update["policy/clip_fraction"] > 0.02 for of_update in metrics[1::2])
    assert all(of_update["policy/gradient_norm"] > RUN["gradient_clip_val"] for of_update in metrics)
    assert all(of_update["policy/kl"] > 0 for of_update in metrics[1:])


def test_the_few_have_every_strategy_layout_accumulation_and_check():
    assert set(FEW) <= set(CELLS)
    for column in ("strategy", "ranks"):
        assert {getattr(cell, column) for cell in FEW} == {getattr(cell, column) for cell in CELLS}
    for column in ("accumulate", "trained", "layout"):
        asked = {cell.columns[column] for cell in CELLS if column in cell.columns}
        assert {cell.columns[column] for cell in FEW if column in cell.columns} == asked
    assert {type(cell.check) for cell in FEW} == {type(cell.check) for cell in CELLS}

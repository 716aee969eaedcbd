"""Throughput per rank: the arithmetic, the page, and a trial with real ranks."""

import json

import pytest

from tools.benchmark import machine, ranks
from tools.benchmark.ranks import COMMAND, DOCS, Throughput, main, table
from tools.benchmark.workloads import WORKLOADS, for_ranks
from tools.marked import END, begin, with_part

PAGE = f"# Scaling\n\n{begin(COMMAND)}\n\n{ranks.NOT_MEASURED}\n\n{END}\n\nMore.\n"


def test_each_rank_has_the_work_of_one():
    one, two = WORKLOADS["W1"], for_ranks(WORKLOADS["W1"], 2)
    assert two.num_completions == 2 * one.num_completions
    assert (two.prompt_tokens, two.max_new_tokens, two.model) == (one.prompt_tokens, one.max_new_tokens, one.model)


def test_throughput_is_the_median_of_what_rounds_say():
    # By round 0.5, 1, 0.8: a slow round of both says as much as a fast one.
    assert Throughput(strategy="ddp", seconds=[2, 10, 5], alone_seconds=[1, 10, 4]).per_rank == 0.8


def test_the_page_has_the_committed_figures_or_says_that_there_are_none():
    file, page = DOCS / "figures" / "ranks.json", (DOCS / "scaling.md").read_text()
    if not file.exists():
        assert with_part(page, COMMAND, ranks.NOT_MEASURED) == page
        return
    measured = json.loads(file.read_text())
    assert with_part(page, COMMAND, table(measured)) == page
    conditions = measured["conditions"]
    assert conditions["is_a_measurement"]
    assert not conditions["is_reduced"]
    assert conditions["rounds"] >= 5


def test_on_a_busy_machine_nothing_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ranks.os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (100.0, 0.0, 0.0))
    monkeypatch.setattr(machine.time, "sleep", lambda seconds: None)
    assert main(["--docs", str(tmp_path)]) == 1
    assert "Nothing is claimed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_one_core_is_too_few(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ranks.os, "sched_getaffinity", lambda pid: {0})
    assert main(["--docs", str(tmp_path)]) == 1
    assert "two cores" in capsys.readouterr().err


@pytest.mark.slow
def test_a_trial_writes_every_figure_and_the_page(tmp_path, capfd):
    (tmp_path / "scaling.md").write_text(PAGE)
    assert main(["--reduced", "--allow-busy", "--rounds", "2", "--docs", str(tmp_path)]) == 0
    measured = json.loads((tmp_path / "figures" / "ranks.json").read_text())
    assert not measured["conditions"]["is_a_measurement"]
    assert [found["strategy"] for found in measured["throughput"]] == ["ddp", "fsdp2"]
    for found in measured["throughput"]:
        assert len(found["seconds"]) == len(found["alone_seconds"]) == 2
        assert all(seconds > 0 for seconds in found["seconds"])
    assert table(measured) in (tmp_path / "scaling.md").read_text()
    assert "rank 1 (" not in capfd.readouterr().err, "the ranks stop together"

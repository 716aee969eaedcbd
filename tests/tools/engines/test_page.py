"""The tables of the engines, and that the page has what was measured."""

import json

import pytest

from tools.engines import page
from tools.marked import with_part


def test_a_row_is_an_engine():
    figures = {
        "raw_tokens_per_second": 845.6,
        "tokens_per_second": 814.4,
        "share_of_raw": 0.9631,
        "share_of_raw_without_sync": 0.9754,
        "sync_seconds": 0.1718,
    }
    assert page.throughput({"engines": {"VLLMEngine": figures}}).splitlines()[2] == (
        "| VLLMEngine | 846 | 814 | 0.963 | 0.975 | 0.17 |"
    )


def test_of_several_seeds_the_worst_difference_stands():
    runs = [
        {"accuracy": 0.99, "mean_difference": 2e-6, "largest_mean_difference": 3e-6},
        {"accuracy": 1.0, "mean_difference": 1e-6, "largest_mean_difference": 9e-6},
    ]
    assert page.learning({"runs": {"VLLMEngine": runs}}).splitlines()[2] == (
        "| VLLMEngine | 99.0%, 100.0% | 2.0e-06 | 9.0e-06 |"
    )


def test_what_drawing_ahead_saves():
    compared = {"in turn": 4.0, "ahead": 2.5, "fall": 0.375, "generate_over_rest": 1.04}
    assert page.overlap({"compared": compared}).splitlines()[2] == "| 1.04 | 4.00 | 2.50 | 38% |"


@pytest.mark.parametrize("name", page.PARTS)
def test_the_page_has_the_committed_figures_or_says_that_there_are_none(name):
    text = page.PAGE.read_text()
    assert with_part(text, page.command_of(name), page.written(name)) == text


@pytest.mark.parametrize("name", page.PARTS)
def test_the_conditions_are_there(name):
    file = page.file_of(name)
    if file.exists():
        assert {"processor", "cores"} <= json.loads(file.read_text())["conditions"].keys()

"""`docs/metrics.md` names what runs log, and nothing else."""

import re
from pathlib import Path

import pytest
import replay

from grpo_lightning.callbacks.gradient_norm import GradientNorm
from grpo_lightning.callbacks.throughput import Throughput

PAGE = Path(__file__).parents[2] / "docs/metrics.md"
RUNS = (
    {"objective": "everything", "num_epochs": 2},
    {"objective": "cispo", "num_epochs": 2},
    {"objective": "default", "draw_ahead": True, "num_epochs": 2},
)


def documented():
    rows = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return {name.replace("<name>", "token_sum") for row in rows for name in re.findall(r"`([^`]+)`", row)}


@pytest.fixture(scope="module")
def logged():
    names = set()
    for run in RUNS:
        record, _ = replay.run(
            **run, live=True, num_solved_in_seven=4, callbacks=[GradientNorm(), Throughput(1e9, 1e9)]
        )
        names |= set().union(*record.metrics)
    return names


def test_every_metric_of_a_run_is_in_the_table(logged):
    assert logged - documented() == set()


def test_every_metric_of_the_table_is_logged(logged):
    assert documented() - logged == set()

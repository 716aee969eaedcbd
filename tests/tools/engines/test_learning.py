"""The runs that engines are compared by."""

import json
import sys
from pathlib import Path

import pytest

from tools.engines.learning import ACCURACY, DIFFERENCE, ENGINES, command, curves

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("engine", ENGINES)
def test_each_engine_has_an_overlay_of_its_own(engine):
    overlay = ENGINES[engine][0]
    assert f"class_path: {engine.split()[0]}\n" in (ROOT / overlay).read_text()


def test_runs_differ_in_their_engine_and_seed_alone(tmp_path):
    one = command(["a.yaml"], seed=1, steps=40, folder=tmp_path)
    other = command(["b.yaml"], seed=2, steps=40, folder=tmp_path)
    assert one[:4] == [sys.executable, "-m", "grpo_lightning", "fit"]
    assert {(a, b) for a, b in zip(one, other, strict=True) if a != b} == {("a.yaml", "b.yaml"), ("1", "2")}
    assert json.loads(one[one.index("--trainer.logger") + 1])["init_args"] == {"save_dir": str(tmp_path)}


def test_the_values_of_a_run_are_read_in_their_order(tmp_path):
    folder = tmp_path / "logs" / "version_0"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(f"step,{DIFFERENCE},{ACCURACY}\n0,1e-6,\n1,3e-6,\n1,,0.25\n2,2e-6,\n2,,0.5\n")
    assert curves(tmp_path) == {ACCURACY: [0.25, 0.5], DIFFERENCE: [1e-6, 3e-6, 2e-6]}

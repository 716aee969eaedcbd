"""The file of numbers, the tables and figures made of it, and the page that shows them."""

import json
from pathlib import Path

import pytest

from tools.experiments import figures
from tools.experiments.experiment import SEEDS, Comparison, Experiment, Panel, Run, main, read

DOCS = Path(__file__).parents[3] / "docs"


def train(arm, *, seed, num_updates):
    gain = {"fast": 2.0, "slow": 1.0}[arm] * seed
    return {"update": list(range(num_updates)), "value": [gain * update for update in range(num_updates)]}


EXPERIMENT = Experiment(
    name="toy",
    arms=("fast", "slow"),
    num_updates=3,
    train=train,
    outcome=lambda curves: curves["value"][-1],
    outcome_label="last value",
    comparisons=(Comparison(larger="fast", smaller="slow"), Comparison(larger="slow")),
    panels=(Panel(x="update", y="value", label="value"),),
)


@pytest.fixture
def folder(tmp_path):
    main(EXPERIMENT, ["--seeds", "2", "3", "--folder", str(tmp_path)])
    return tmp_path


def test_every_arm_is_trained_from_every_seed_and_written_with_the_versions(folder):
    content = json.loads((folder / "toy.json").read_text())
    assert content["experiment"] == "toy"
    assert {"torch", "grpo_lightning"} <= set(content["versions"])
    runs = read(folder / "toy.json")
    assert [(run.arm, run.seed) for run in runs] == [("fast", 2), ("slow", 2), ("fast", 3), ("slow", 3)]
    assert runs[2].curves == train("fast", seed=3, num_updates=3)


def test_the_table_has_the_outcomes_and_the_sign_tests(folder):
    # The last of three values is 2 * gain: 8 and 12 for the fast arm, 4 and 6 for the slow one; 2^-2 by chance.
    assert figures.table(EXPERIMENT, read(folder / "toy.json")) == "\n".join(
        [
            "| last value | seed 2 | seed 3 |",
            "| --- | --: | --: |",
            "| fast | 8 | 12 |",
            "| slow | 4 | 6 |",
            "",
            "fast > slow: 2 of 2 seeds, one-sided sign test p = 0.250.",
            "",
            "slow > 0: 2 of 2 seeds, one-sided sign test p = 0.250.",
        ]
    )


def test_the_same_numbers_draw_the_same_file(folder):
    pytest.importorskip("matplotlib")
    runs = read(folder / "toy.json")
    for name in ("one.svg", "two.svg"):
        figures.draw(EXPERIMENT, runs, folder / name)
    assert (folder / "one.svg").read_bytes() == (folder / "two.svg").read_bytes()
    figures.draw(EXPERIMENT, [Run(**{**vars(run), "curves": train(run.arm, seed=1, num_updates=3)}) for run in runs],
                 folder / "two.svg")  # fmt: skip
    assert (folder / "one.svg").read_bytes() != (folder / "two.svg").read_bytes()


@pytest.mark.parametrize("experiment", figures.EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_the_page_shows_what_the_committed_numbers_say(experiment):
    runs = read(DOCS / "figures" / f"{experiment.name}.json")
    assert {(run.arm, run.seed) for run in runs} == {(arm, seed) for arm in experiment.arms for seed in SEEDS}
    page = (DOCS / "experiments.md").read_text()
    assert figures.table(experiment, runs) in page
    assert f"(figures/{experiment.name}.svg)" in page
    assert (DOCS / "figures" / f"{experiment.name}.svg").is_file()

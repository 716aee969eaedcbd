"""The quickstart learns what it promises, from every seed; with rewards dealt out at random it learns nothing."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_lightning.rewards import RewardCallback

ROOT = Path(__file__).parents[1]
CONTROL = """
model:
  init_args:
    evaluation: {correct: exact_answer}
data:
  init_args: {num_validation: 2048}
trainer:
  callbacks:
    - class_path: ExactAnswer
      init_args: {marker: "#", weight: 0.0}
    - class_path: test_quickstart.ShuffledAnswer
    - class_path: RunSummary
  logger:
    - class_path: CSVLogger
      init_args: {save_dir: runs, name: control, version: grpo}
"""


class ShuffledAnswer(RewardCallback):
    """The control: as many ones as there are right answers, dealt out to the completions at random."""

    def __init__(self) -> None:
        super().__init__("shuffled_answer")
        self.random = random.Random(0)

    def score(self, prompts, completions):
        pairs = zip(prompts, completions, strict=True)
        scores = [float(c.text.rpartition("#")[2] == p.columns["answer"]) for p, c in pairs]
        self.random.shuffle(scores)
        return scores


def fit(folder, *arguments):
    command = [sys.executable, "-W", "ignore", "-m", "grpo_lightning", "fit", "--config", "configs/quickstart.yaml"]
    # On one thread sums are added in one order, whatever else the machine is doing.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *arguments], cwd=folder, env=environment, check=True, capture_output=True)


@pytest.fixture(scope="module", params=[1, 2, 3])
def run(request, tmp_path_factory):
    """A finished quickstart: its folder and its seed."""
    folder = tmp_path_factory.mktemp(f"quickstart-{request.param}")
    shutil.copytree(ROOT / "configs", folder / "configs")
    fit(folder, "--seed_everything", str(request.param))
    return folder, request.param


@pytest.mark.slow
def test_the_policy_finds_that_working_it_out_pays(run):
    folder, _ = run
    summary = json.loads((folder / "runs/quickstart/grpo/summary.json").read_text())
    assert summary["heldout_prompts"] >= 512
    assert 0.2 <= summary["heldout_accuracy_before"] <= 0.5
    assert summary["heldout_accuracy_after"] >= 0.97


@pytest.mark.slow
def test_shuffled_rewards_teach_it_nothing(run):
    folder, seed = run
    (folder / "control.yaml").write_text(CONTROL)
    shutil.copy(__file__, folder / "test_quickstart.py")
    fit(folder, "--config", "control.yaml", "--seed_everything", str(seed))
    summary = json.loads((folder / "runs/control/grpo/summary.json").read_text())
    assert summary["heldout_prompts"] >= 2000
    assert summary["iterations"] == 120
    assert summary["heldout_accuracy_after"] <= summary["heldout_accuracy_before"] + 0.03

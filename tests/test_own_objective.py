"""A part of the objective from outside of the package: the README's file and its YAML entry, by the command line."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from grpo_lightning.cli import main
from grpo_lightning.policy import CharacterPolicy, Policy

ROOT = Path(__file__).parents[1]
CALLBACKS = """
from lightning.pytorch import Callback

from grpo_lightning.rewards import RewardCallback

SEEN = {}


class TokenSum(RewardCallback):
    def __init__(self):
        super().__init__("token_sum")

    def score(self, prompts, completions):
        return [float(sum(completion.token_ids)) for completion in completions]


class Watch(Callback):
    def on_train_end(self, trainer, pl_module):
        SEEN["surrogate"] = pl_module.objective.surrogate

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        SEEN.setdefault("beyond", []).append(float(trainer.callback_metrics["policy/beyond_width"]))
"""
TINY = {
    "model": {
        "init_args": {
            "policy": {"init_args": {"path": "policy", "made_by": None}},
            "objective": {"surrogate": {"init_args": {"width": 1e-3}}},
            "groups": {"class_path": "KeepAll"},
            "sampling": {"max_new_tokens": 4},
            "optimizer": {"init_args": {"lr": 1e-2}},
            "prompts_per_iteration": 2,
            "group_size": 4,
            "num_epochs": 3,
        }
    },
    "data": {"init_args": {"num_train": 8, "num_validation": 4, "num_test": 4, "num_demonstrations": 8}},
    "trainer": {
        "max_steps": 6,
        "limit_val_batches": 0,
        "val_check_interval": None,
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "callbacks": [{"class_path": "my_callbacks.TokenSum"}, {"class_path": "my_callbacks.Watch"}],
    },
}


def block(language, first_line):
    """The README's example that begins with this comment."""
    text = (ROOT / "README.md").read_text()
    (found,) = re.findall(rf"```{language}\n# {re.escape(first_line)}\n(.*?)```", text, re.DOTALL)
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current folder with the README's two files, a tiny policy, and the quickstart's config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    shutil.copytree(ROOT / "configs", "configs")
    Path("my_surrogate.py").write_text(block("python", "my_surrogate.py"))
    Path("my_objective.yaml").write_text(block("yaml", "my_objective.yaml"))
    Path("my_callbacks.py").write_text(CALLBACKS)
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
    source = CharacterPolicy(hidden_size=16, num_layers=1, num_heads=2, max_positions=128)
    Policy(source.load_model(seed=0), source.load_tokenizer()).save(Path("policy"))
    yield tmp_path
    for name in ("my_surrogate", "my_callbacks"):
        sys.modules.pop(name, None)


def test_one_file_and_one_entry_are_a_part_of_ones_own(folder):
    overlays = ("configs/quickstart.yaml", "my_objective.yaml", "tiny.yaml")
    main(["fit", *(argument for name in overlays for argument in ("--config", name))])
    seen = sys.modules["my_callbacks"].SEEN
    assert type(seen["surrogate"]) is sys.modules["my_surrogate"].PullBack
    assert seen["surrogate"].width == 1e-3
    # The first update of an iteration has no ratio but 1; after a step of 1e-2 the others are beyond 1e-3.
    beyond = torch.tensor(seen["beyond"]).view(2, 3)
    assert (beyond[:, 0] == 0).all()
    assert (beyond[:, 1:] > 0.5).all()


def test_a_setting_that_it_lacks_is_named(folder, capsys):
    arguments = ["--model.objective.surrogate.clip_high", "0.3"]
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "--config", "configs/quickstart.yaml", "--config", "my_objective.yaml", *arguments])
    assert exit_info.value.code == 2
    assert "clip_high" in capsys.readouterr().err

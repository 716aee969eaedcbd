"""Policies that the experiments start from: each is made once, by imitation of demonstrations, and then shared."""

from functools import partial
from pathlib import Path

import torch

from grpo_lightning.data import PromptDataModule
from grpo_lightning.policy import PolicySource, PretrainedPolicy
from grpo_lightning.supervised import SupervisedModule
from tools.experiments.training import quiet_trainer, without_advice

FOLDER = Path("runs/experiments")
adamw = partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.0)


def cold_start(name: str, source: PolicySource, data: PromptDataModule, *, num_updates: int) -> PretrainedPolicy:
    """The policy in ``runs/experiments/<name>``, trained on demonstrations first where it is not there yet.

    Args:
        name: Of the folder.
        source: The untrained policy.
        data: Has the demonstrations.
        num_updates: Optimizer steps, on 128 demonstrations each.
    """
    folder = FOLDER / name
    if not (folder / "config.json").is_file():
        module = SupervisedModule(source, partial(adamw, lr=3e-3), batch_size=128, export_to=str(folder))
        with without_advice():
            quiet_trainer(num_updates, []).fit(module, data)
    return PretrainedPolicy(str(folder))

"""A cold start on twelve sums, in this process or as one rank of a world."""

from functools import partial

import torch
from lightning.pytorch import Trainer
from replay import TinyPolicy

from grpo_lightning import SupervisedModule
from grpo_lightning.data import PromptDataModule
from grpo_lightning.policy import LoRA


class Sums(PromptDataModule):
    """Twelve sums, of which some answers are longer than others."""

    def rows(self, split):
        return self.demonstration_rows() if split == "train" else []

    def demonstration_rows(self):
        return [{"prompt": f"{i}+{i}=", "demonstration": f"{2 * i}" + "=" * (i % 4) * 3} for i in range(12)]


def make(tmp_path, *, batch_size=4, dtype=torch.float64, lr=1e-2, lora=None, gradient_checkpointing=False, **trainer):
    module = SupervisedModule(
        TinyPolicy(dtype),
        partial(torch.optim.Adam, lr=lr),
        batch_size,
        str(tmp_path / "policy"),
        lora=lora and LoRA(**lora),
        gradient_checkpointing=gradient_checkpointing,
        seed=5,
    )
    settings = {"max_steps": 6, "max_epochs": -1, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return module, Trainer(**{**settings, **quiet, "limit_val_batches": 0, **trainer})


def imitate(folder, strategies):
    """One rank's part in a run under each strategy, two ranks to each; the policy is left in a folder of its name."""
    for strategy in strategies:
        module, trainer = make(folder / strategy, dtype=torch.float32, strategy=strategy, devices=2)
        trainer.fit(module, Sums())

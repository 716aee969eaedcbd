"""What a tiny run that is started by a launch file asks for."""

import os
from pathlib import Path

import replay
from eventful import Moment

WAITS_IN = "GRPO_LIGHTNING_WAITS_IN"
"""The variable with the folder in which a rank says, in its fourth iteration, that it waits."""


class PatientSum(replay.TokenSum):
    """A sum over tokens, and a moment to be interrupted at."""

    def __init__(self) -> None:
        super().__init__()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.rank = trainer.global_rank

    def score(self, prompts, completions):
        if self.iteration == 3 and WAITS_IN in os.environ:
            Moment(Path(os.environ[WAITS_IN]), "score").come(self.rank)
        return super().score(prompts, completions)

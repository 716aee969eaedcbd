"""A run under every controller at once, and everything of its state after each update."""

import torch
from lightning.pytorch.callbacks import Callback
from shards import whole

from grpo_lightning.callbacks.adaptive_entropy import AdaptiveEntropy
from grpo_lightning.callbacks.adaptive_kl import AdaptiveKL
from grpo_lightning.callbacks.prompt_retirement import PromptRetirement
from grpo_lightning.callbacks.reference_average import ReferenceAverage
from grpo_lightning.callbacks.reference_refresh import ReferenceRefresh
from grpo_lightning.objective import (
    K3,
    Clipped,
    EntropyBonus,
    GroupMean,
    GroupStd,
    KLInLoss,
    Objective,
    SequenceMeanTokenMean,
    TokenRatio,
)


def controllers() -> list[Callback]:
    """All of them, so set that each one acts within a few updates."""
    return [
        PromptRetirement(pass_rate=0.6, window=2),
        ReferenceRefresh(every_n_steps=7),
        ReferenceAverage(share=0.5, every_n_steps=3),
        AdaptiveKL(target=1e-4, gain=1.0),
        AdaptiveEntropy(target=2.648, step=0.01),  # what the entropy falls to within ten updates
    ]


def objective() -> Objective:
    """With what they control: a penalty and a bonus."""
    return Objective(
        advantage=GroupMean(),
        scale=GroupStd(ddof=1, epsilon=1e-6),
        ratio=TokenRatio(),
        surrogate=Clipped(clip_low=0.2, clip_high=0.2),
        kl=KLInLoss(coefficient=0.05, estimator=K3()),
        entropy=EntropyBonus(coefficient=0.2),
        aggregation=SequenceMeanTokenMean(),
    )


class States(Callback):
    """After each update: whatever the next one depends on, weights aside."""

    def __init__(self) -> None:
        self.states: list[dict] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch.ends_update:
            self.states.append(
                {
                    "reference": torch.cat([whole(p.detach()).flatten() for p in pl_module.reference.parameters()]),
                    "coefficients": tuple(pl_module.coefficients),
                    "stream": pl_module.prompts.state_dict(),
                    "callbacks": {c.state_key: c.state_dict() for c in trainer.callbacks if c.state_dict()},
                    "tokens": (pl_module.tokens_generated, pl_module.tokens_trained),
                }
            )

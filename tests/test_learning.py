"""Does it learn, and does a control not learn: the whole loop, from random weights."""

import random
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from replay import Sums

from grpo_lightning import GRPOModule
from grpo_lightning.objective import grpo
from grpo_lightning.policy import CharacterPolicy, LoRA
from grpo_lightning.rewards import RewardCallback
from grpo_lightning.types import SamplingParams


class Sevens(RewardCallback):
    """The share of sevens; where `is_shuffled`, dealt out to the completions at random."""

    def __init__(self, is_shuffled):
        super().__init__("sevens")
        self.is_shuffled = is_shuffled
        self.random = random.Random(0)

    def score(self, prompts, completions):
        self.shares = [c.text.count("7") / len(c.token_ids) for c in completions]
        scores = list(self.shares)
        if self.is_shuffled:
            self.random.shuffle(scores)
        return scores


class Shares(Callback):
    def __init__(self, reward):
        self.reward, self.means = reward, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.means.append(sum(self.reward.shares) / len(self.reward.shares))


def train(seed, *, is_shuffled, max_steps=60, lr=3e-3, lora=None):
    reward = Sevens(is_shuffled)
    shares = Shares(reward)
    module = GRPOModule(
        CharacterPolicy("0123456789+=", hidden_size=32, num_layers=1, num_heads=2, max_positions=32),
        grpo(kl_coefficient=0.0),
        SamplingParams(max_new_tokens=8),
        partial(torch.optim.AdamW, lr=lr),
        prompts_per_iteration=8,
        group_size=8,
        lora=lora and LoRA(**lora),
        seed=seed,
    )
    trainer = Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[reward, shares],
    )
    trainer.fit(module, Sums())
    return sum(shares.means[:3]) / 3, sum(shares.means[-10:]) / 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_learns_what_is_rewarded(seed):
    before, after = train(seed, is_shuffled=False)
    assert before < 0.2  # one of twelve characters by chance
    assert after > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_does_not_learn_from_shuffled_rewards(seed):
    before, after = train(seed, is_shuffled=True)
    assert after < before + 0.3  # a random walk of the policy may drift, but far less than learning moves it

"""Runs of the tiny policy with parts of Lightning's: one update per iteration, three iterations per epoch."""

import csv
from pathlib import Path

import replay
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file


def fit(*, evaluation_batch_size=4, ckpt_path=None, **settings):
    """A run of `replay.make`'s settings: what it recorded, its module and its Trainer."""
    module, _, trainer, record = replay.make(**settings)
    trainer.fit(module, replay.Sums(evaluation_batch_size=evaluation_batch_size), ckpt_path=ckpt_path)
    return record, module, trainer


VALIDATED = {"limit_val_batches": 1.0, "check_val_every_n_epoch": None}
"""Validates as `val_check_interval` says, which counts micro-batches."""


class Steps(Callback):
    """The optimizer steps made when a hook was called."""

    def __init__(self, hook):
        self.seen = []
        setattr(self, hook, lambda trainer, *_: self.seen.append(trainer.global_step))


def rows(folder):
    """The lines of a CSV logger's file, each with what stands in it."""
    with (Path(folder) / "metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if value != ""} for row in csv.DictReader(file)]


def flat(state):
    """The policy's weights of a checkpoint, in one vector."""
    return torch.cat([weight.flatten() for name, weight in state.items() if name.startswith("policy.")])


def exported(folder):
    """The weights of an exported policy by name."""
    return load_file(Path(folder) / "model.safetensors")


def same(one, other):
    """Whether two runs recorded the same weights, bit by bit."""
    return len(one) == len(other) > 0 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

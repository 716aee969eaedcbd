"""A run of two ranks in which something happens to one: `python eventful.py FOLDER SETTINGS`, by whatever launches it.

In the second iteration the ranks come to a moment at which they say so, by a file with their process, and wait until
there is a file ``go_on``.
"""

import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import replay
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from grpo_lightning.rollout import InProcessEngine
from grpo_lightning.strategies import FSDP2Strategy, ZeROStrategy

WAIT_SECONDS = 300
STRATEGIES = {
    "single": lambda: "auto",
    "ddp": partial(DDPStrategy, process_group_backend="gloo"),
    "fsdp2": FSDP2Strategy,
    "deepspeed_2": partial(ZeROStrategy, stage=2),
    "deepspeed_3": partial(ZeROStrategy, stage=3),
}


class Moment(Callback):
    """Where a rank waits.

    Args:
        folder: For the files.
        name: ``generate``, where ranks exchange nothing; ``update``, where the others wait for this one's gradients;
            ``error``, at which the victim does not wait but raise.
        victim: The rank that something happens to.
    """

    def __init__(self, folder, name, victim=None):
        self.folder, self.name, self.victim = folder, name, victim
        self.is_over = False

    def on_before_backward(self, trainer, pl_module, loss):
        tick = pl_module._tick
        if self.name == "update" and pl_module.iteration == 1 and tick.microbatch == tick.num_microbatches - 1:
            self.come(trainer.global_rank, wait=trainer.global_rank == self.victim)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.name == "error" and pl_module.iteration == 1 and trainer.global_rank == self.victim:
            raise OSError("the disk of this rank is full")

    def come(self, rank, *, wait=True):
        if self.is_over:
            return
        self.is_over = True
        unfinished = self.folder / f"unfinished.{rank}"
        unfinished.write_text(str(os.getpid()))
        unfinished.rename(self.folder / f"at_moment.{rank}")
        deadline = time.monotonic() + WAIT_SECONDS
        while wait and time.monotonic() < deadline and not (self.folder / "go_on").exists():
            time.sleep(0.05)


class WaitingEngine(InProcessEngine):
    """Waits in the middle of a rollout."""

    def __init__(self, moment, rank):
        super().__init__()
        self.moment, self.rank = moment, rank

    def generate(self, requests, sampling, coordinates):
        drawn = super().generate(requests, sampling, coordinates)
        if coordinates.iteration == 1:
            self.moment.come(self.rank)
        return drawn


def main(folder, *, strategy, of_strategy=None, moment=None, victim=None, ckpt_path=None, **settings):
    at = Moment(folder, moment, victim)
    checkpoints = ModelCheckpoint(dirpath=folder / "checkpoints", every_n_train_steps=100, save_last=True)
    module, data, trainer, record = replay.make(
        strategy=STRATEGIES[strategy](**(of_strategy or {})),
        live=True,
        enable_checkpointing=True,
        default_root_dir=folder,
        callbacks=[at, checkpoints],
        **settings,
    )
    if moment == "generate":
        module.engine = WaitingEngine(at, trainer.global_rank)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    result = {"weights": record.weights, "metrics": record.metrics}
    torch.save(result, folder / f"result.{trainer.global_rank}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))

"""The worker of `ranks`: `tools.benchmark.ours` on one rank, or on several that Lightning starts from the first."""

import argparse
import logging
import os
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, __version__

from grpo_lightning.ending import StoppedRun
from grpo_lightning.policy import PretrainedPolicy
from tools.benchmark import memory
from tools.benchmark.ours import EvenSum, Gate, RandomPrompts, make_module
from tools.benchmark.protocol import Channel, FinishedError, Hello
from tools.benchmark.workloads import WORKLOADS, Workload, for_ranks


class SharedGate(Gate):
    """Holds the first rank; the others wait for it. When the coordinator has had enough, all stop together."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that everything is loaded."""
        if trainer.is_global_zero:
            super().on_train_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Wait."""
        if not trainer.is_global_zero:
            return
        try:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        except FinishedError:
            pl_module.stopping.signum = signal.SIGTERM

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report."""
        if trainer.is_global_zero:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def serve(channel: Channel, workload: Workload, folder: Path, *, strategy: str, num_ranks: int) -> None:
    """Train until the coordinator has had enough.

    Args:
        channel: To the coordinator; of the first rank.
        workload: Of one rank; several have several times the prompts.
        folder: Of the model.
        strategy: The Trainer's.
        num_ranks: How many there are.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    of_all = for_ranks(workload, num_ranks)
    hello = partial(Hello, framework=f"grpo_lightning, Lightning {__version__}", base_bytes=memory.current())
    trainer = Trainer(
        accelerator="cpu",
        devices=num_ranks,
        strategy=strategy,
        max_epochs=-1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[EvenSum(), SharedGate(channel, hello, {})],
    )
    torch.set_num_threads(1)
    module = make_module(of_all, PretrainedPolicy(str(folder)), is_fused=strategy == "auto")
    with suppress(StoppedRun):
        trainer.fit(module, RandomPrompts(of_all))


def main() -> None:
    """Serve as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("descriptor", type=int)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strategy", required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--reduced", action="store_true")
    settings = parser.parse_args()
    workload = WORKLOADS[settings.workload]
    workload = workload.reduced() if settings.reduced else workload
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    channel = Channel(settings.descriptor if is_first else os.open(os.devnull, os.O_RDWR))
    serve(channel, workload, settings.folder, strategy=settings.strategy, num_ranks=settings.ranks)


if __name__ == "__main__":
    main()

"""Runs that save, are killed, and go on under another strategy: what each of them held in its shards, put together."""

import gc
import os
import signal
from importlib import import_module

import replay
import torch
from lightning.pytorch.callbacks import Callback
from shards import local, optimizer_states, whole
from torch.utils._pytree import tree_map

from grpo_lightning.checkpointing.export import WholeFiles
from grpo_lightning.checkpointing.search import in_folder, newest_first
from grpo_lightning.strategies import FSDP2Strategy, ZeROStrategy

# Recorded rollouts of ragged lengths, clipping, a schedule, two updates per rollout, accumulation.
SETTINGS = {
    "num_epochs": 2,
    "accumulate": 2,
    "iterations": 4,
    "schedule": {"warmup_steps": 2, "decay": "linear"},
}
SAVED_AT = 4 * 2 + 2  # micro-batches: in the middle of the third iteration, whose experience the checkpoint holds
UPDATES_AFTER = 3

STRATEGIES = {
    "single": lambda: "auto",
    "ddp": lambda: "ddp",
    "fsdp2": FSDP2Strategy,
    "fsdp2_sharded": lambda: FSDP2Strategy(checkpoint="sharded"),
    "deepspeed_1": lambda: ZeROStrategy(stage=1),
    "deepspeed_2": lambda: ZeROStrategy(stage=2),
    # Small weights are cut too, for there are no others.
    "deepspeed_3": lambda: ZeROStrategy(stage=3, zero_settings={"stage3_param_persistence_threshold": 0}),
}


class Sizes(Callback):
    """How many elements of weights and states a rank has in its memory when it saves, besides those it trains."""

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        (states,) = (state["state"] for state in checkpoint["optimizer_states"])
        tensors = [*checkpoint["state_dict"].values(), *(t for entries in states.values() for t in entries.values())]
        self.saved = sum(local(tensor).numel() for tensor in tensors)


PROBE = torch.tensor([[3, 4, 5, 6, 7, 8, 9]])


class Held(Callback):
    """What the run holds before its first step: right after a restore."""

    def on_train_start(self, trainer, pl_module):
        self.weights = {f"policy.{name}": whole(p).detach().clone() for name, p in pl_module.policy.named_parameters()}
        self.states = tree_map(torch.clone, optimizer_states(trainer))  # which the steps to come change


class SaveWithLogits(replay.SaveAt):
    """Saves, and asks the policy as it is for its logits."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.number:
            with torch.no_grad(), pl_module.drawable_policy():
                self.logits = pl_module.policy.model(PROBE).logits
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def told(*, strategy, ranks=1, save=None, ckpt_path=None):
    """What one rank has to tell of a run."""
    held, saves, sizes = Held(), [SaveWithLogits(SAVED_AT, save)] if save else [], Sizes()
    module, data, trainer, record = replay.make(
        **SETTINGS, ranks=ranks, strategy=STRATEGIES[strategy](), callbacks=[held, sizes, *saves]
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return {
        "gradients": record.gradients,
        "weights": record.weights,
        "held": held.weights,
        "states": held.states,
        "logits": saves[0].logits if saves else None,
        "saved_elements": sizes.saved if saves else None,
    }


def rank_of_world(folder, runs):
    """One rank's part in each run; the first writes what it has to tell."""
    rank = int(os.environ["LOCAL_RANK"])
    (folder / f"ready.{rank}").touch()
    for number, settings in enumerate(runs):
        result = told(**settings)
        torch.save(result, folder / f"run.{number}.{rank}")
        gc.collect()


def read(checkpoint):
    """All of a checkpoint, whatever wrote it."""
    return WholeFiles().load_checkpoint(checkpoint)


def killed_in_a_save(folder, strategy, step, number):
    """A run that saves every iteration under the same name, and kills a rank when it has come to a step so often.

    Args:
        folder: Where it saves.
        strategy: Of `STRATEGIES`.
        step: A function of the package, as "module:name".
        number: The call that kills; negative for the last rank's, positive for the first's.
    """
    ranks = 1 if strategy == "single" else 2
    if int(os.environ["LOCAL_RANK"]) == (0 if number > 0 else ranks - 1):
        _kill_at(step, abs(number))
    saves = [replay.SaveAt(4 * i, folder / "checkpoints" / "last.ckpt") for i in (1, 2)]
    module, data, trainer, _ = replay.make(**SETTINGS, ranks=ranks, strategy=STRATEGIES[strategy](), callbacks=saves)
    trainer.fit(module, data)


def gone_on(folder):
    """The run that goes on from the newest checkpoint of a folder that is whole."""
    module, data, trainer, record = replay.make(**SETTINGS)
    found = newest_first(in_folder(folder))
    module.found_checkpoints = found
    trainer.fit(module, data, ckpt_path=found[0])
    return record


def _kill_at(step, number):
    module, _, names = step.partition(":")
    owner = import_module(module)
    *outer, name = names.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), []

    def counted(*arguments, **settings):
        calls.append(None)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **settings)

    setattr(owner, name, counted)

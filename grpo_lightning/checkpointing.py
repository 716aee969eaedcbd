"""The policy as a folder that transformers loads, beside every checkpoint."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from torch import Tensor

Weights = dict[str, Tensor]


class PolicyExport(_WrappingCheckpointIO):
    """Writes ``<checkpoint>.policy/`` beside each checkpoint and removes it with it.

    Args:
        checkpoint_io: What writes the checkpoint itself.
        save_policy: Writes the policy's folder, from the weights that a checkpoint holds.
    """

    def __init__(self, checkpoint_io: CheckpointIO, save_policy: Callable[[Path, Weights], None]) -> None:
        super().__init__(checkpoint_io)
        self.save_policy = save_policy

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write the folder, then the checkpoint: whoever finds a checkpoint finds its policy."""
        weights = checkpoint["state_dict"]
        write_whole(policy_folder(path), lambda folder: self.save_policy(folder, weights))
        self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)  # type: ignore[union-attr]

    def remove_checkpoint(self, path: Any) -> None:
        """Remove both."""
        super().remove_checkpoint(path)
        shutil.rmtree(policy_folder(path), ignore_errors=True)


def policy_folder(checkpoint: Any) -> Path:
    """Where the policy of a checkpoint lies: ``last.ckpt`` has ``last.policy``."""
    return Path(checkpoint).with_suffix(".policy")


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder whole or not at all: under another name first, which then takes the folder's place."""
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    write(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)

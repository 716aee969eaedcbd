"""Checkpoints read by every rank, none of which needs a copy of all of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from grpo_lightning.checkpointing.export import VerifiedCheckpoints


def read_mapped(
    checkpoint_io: CheckpointIO, path: Path, *, read_folder: Callable[..., dict[str, Any]], weights_only: bool | None
) -> dict[str, Any]:
    """The checkpoint at a path, or the one that is taken in its place where it is torn.

    Args:
        checkpoint_io: The strategy's, which chooses.
        path: Of a file, whose tensors are mapped into memory and not read, or of a folder of shards.
        read_folder: Reads a folder; called as ``read_folder(path, weights_only=weights_only)``.
        weights_only: See ``torch.load``.
    """
    if isinstance(checkpoint_io, VerifiedCheckpoints):
        path = checkpoint_io.choose(path)
    if path.is_dir():
        return read_folder(path, weights_only=weights_only)
    checkpoint: dict[str, Any] = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
    return checkpoint

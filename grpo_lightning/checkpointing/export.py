"""The policy as a folder that transformers loads, beside every checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from torch import Tensor

from grpo_lightning.checkpointing.manifest import manifest_of
from grpo_lightning.checkpointing.shards import read_whole
from grpo_lightning.checkpointing.writing import remove, write_file, write_whole

Weights = dict[str, Tensor]


class WholeFiles(TorchCheckpointIO):
    """Lightning's files, with a manifest, and written as they are serialised: Lightning holds two copies of each."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write it whole or not at all.

        Raises:
            TypeError: There are `storage_options`.
        """
        if storage_options is not None:
            raise TypeError(f"Trainer.save_checkpoint: files have no storage_options, got {storage_options!r}.")
        write_file(checkpoint, Path(path), global_step=checkpoint.get("global_step"))

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Of a folder with shards, the whole as well."""
        if Path(path).is_dir():
            return read_whole(Path(path), weights_only=weights_only)
        return super().load_checkpoint(path, map_location, weights_only)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove it and its manifest."""
        if not Path(path).is_symlink():
            remove(manifest_of(Path(path)))
        remove(Path(path))


class PolicyExport(_WrappingCheckpointIO):
    """Writes ``<checkpoint>.policy/`` beside each checkpoint and removes it with it; loads what is whole.

    Args:
        checkpoint_io: What writes the checkpoint itself; `WholeFiles` take the place of Lightning's default.
        save_policy: Writes the policy's folder, from the weights that a checkpoint holds.
        choose: Verifies a checkpoint, and says which to load, see `whole_checkpoint`.
    """

    def __init__(
        self,
        checkpoint_io: CheckpointIO,
        save_policy: Callable[[Path, Weights], None],
        choose: Callable[[Path], Path],
    ) -> None:
        super().__init__(_with_whole_files(checkpoint_io))
        self.save_policy, self.choose = save_policy, choose

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write the folder, then the checkpoint: whoever finds a checkpoint finds its policy."""
        self.export(Path(path), checkpoint["state_dict"])
        self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)  # type: ignore[union-attr]

    def export(self, path: Path, weights: Weights) -> None:
        """Write the folder alone."""
        write_whole(policy_folder(path), lambda folder: self.save_policy(folder, weights))

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load what is whole. A collective."""
        return super().load_checkpoint(self.choose(Path(path)), *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove both."""
        super().remove_checkpoint(path)
        remove(policy_folder(path))


def policy_folder(checkpoint: Any) -> Path:
    """Where the policy of a checkpoint lies: ``last.ckpt`` has ``last.policy``."""
    return Path(checkpoint).with_suffix(".policy")


def _with_whole_files(checkpoint_io: CheckpointIO) -> CheckpointIO:
    """The same with `WholeFiles` innermost, unless a user has put another class there."""
    if isinstance(checkpoint_io, _WrappingCheckpointIO):
        if type(checkpoint_io.checkpoint_io) is TorchCheckpointIO:
            checkpoint_io._checkpoint_io = WholeFiles()
        return checkpoint_io
    return WholeFiles() if type(checkpoint_io) is TorchCheckpointIO else checkpoint_io

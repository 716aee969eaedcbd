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
from grpo_lightning.checkpointing.writing import policy_folder, prepare_policy, remove, take_place, write_file

Weights = dict[str, Tensor]


PREPARED_POLICY = "prepared_policy"
"""The key under which `WholeFiles` are told, through whatever is around them, of the policy that lies aside."""


class WholeFiles(TorchCheckpointIO):
    """Lightning's files, with a manifest, and written as they are serialised: Lightning holds two copies of each."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write it whole or not at all.

        Raises:
            TypeError: There are `storage_options`.
        """
        if storage_options is not None:
            raise TypeError(f"Trainer.save_checkpoint: files have no storage_options, got {storage_options!r}.")
        content = {key: value for key, value in checkpoint.items() if key != PREPARED_POLICY}
        policy = checkpoint.get(PREPARED_POLICY)
        policy = None if policy is None else Path(policy)
        write_file(content, Path(path), global_step=checkpoint.get("global_step"), policy=policy)

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


class VerifiedCheckpoints(_WrappingCheckpointIO):
    """Loads what is whole.

    Args:
        checkpoint_io: What writes checkpoints; `WholeFiles` take the place of Lightning's default.
        choose: Verifies a checkpoint, and says which to load, see `whole_checkpoint`.
    """

    def __init__(self, checkpoint_io: CheckpointIO, choose: Callable[[Path], Path]) -> None:
        super().__init__(_with_whole_files(checkpoint_io))
        self.choose = choose

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load what is whole. A collective."""
        return super().load_checkpoint(self.choose(Path(path)), *args, **kwargs)


class PolicyExport(VerifiedCheckpoints):
    """Writes ``<checkpoint>.policy/`` beside each checkpoint and removes it with it; loads what is whole.

    Args:
        checkpoint_io: See `VerifiedCheckpoints`.
        save_policy: Writes the policy's folder, from the weights that a checkpoint holds.
        choose: See `VerifiedCheckpoints`.
    """

    def __init__(
        self,
        checkpoint_io: CheckpointIO,
        save_policy: Callable[[Path, Weights], None],
        choose: Callable[[Path], Path],
    ) -> None:
        super().__init__(checkpoint_io, choose)
        self.save_policy = save_policy

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write the folder aside, then the checkpoint: both take their places together."""
        prepared = self.prepare(Path(path), checkpoint["state_dict"])
        if isinstance(_innermost(self), WholeFiles):
            self._save({**checkpoint, PREPARED_POLICY: str(prepared)}, path, storage_options)
            return
        remove(policy_folder(path))  # where another class writes the checkpoint, nobody knows when it is there
        self._save(checkpoint, path, storage_options)
        take_place(prepared, policy_folder(path))

    def _save(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None) -> None:
        self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)  # type: ignore[union-attr]

    def prepare(self, path: Path, weights: Weights) -> Path:
        """Write the folder aside, see `prepare_policy`."""
        return prepare_policy(path, lambda folder: self.save_policy(folder, weights))

    def remove_checkpoint(self, path: Any) -> None:
        """Remove both."""
        super().remove_checkpoint(path)
        remove(policy_folder(path))


def _innermost(checkpoint_io: Any) -> CheckpointIO | None:
    while isinstance(checkpoint_io, _WrappingCheckpointIO):
        checkpoint_io = checkpoint_io.checkpoint_io
    return checkpoint_io  # type: ignore[no-any-return]


def _with_whole_files(checkpoint_io: CheckpointIO) -> CheckpointIO:
    """The same with `WholeFiles` innermost, unless a user has put another class there."""
    if isinstance(checkpoint_io, _WrappingCheckpointIO):
        if type(checkpoint_io.checkpoint_io) is TorchCheckpointIO:
            checkpoint_io._checkpoint_io = WholeFiles()
        return checkpoint_io
    return WholeFiles() if type(checkpoint_io) is TorchCheckpointIO else checkpoint_io

"""Where the checkpoints of a run lie, newest first, when the run looks for them itself."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from grpo_lightning.checkpointing.manifest import IN_FOLDER
from grpo_lightning.checkpointing.writing import REPLACED, UNFINISHED


def found_checkpoints(trainer: Trainer, ckpt_path: str | None) -> list[Path]:
    """The checkpoints that `ckpt_path` may mean, the first choice first. Nothing is said of whether they are whole.

    Args:
        trainer: Of the run, which need not be set up.
        ckpt_path: "last" for those in the folders of the run's `ModelCheckpoint` and `OnExceptionCheckpoint`, by their
            age; "hpc" for those that Lightning leaves when SLURM ends a job, and None for the same under SLURM.
    """
    if ckpt_path == "last":
        return by_age(_of_callbacks(trainer))
    if ckpt_path == "hpc" or (ckpt_path is None and SLURMEnvironment.detect()):
        return _of_slurm(Path(trainer.default_root_dir))
    return []


def in_folder(folder: Path) -> Iterator[Path]:
    """The checkpoints in a folder, and those in folders of their own that were to take their place there, or made room.

    The latter count where nothing has taken their place.
    """
    yield from folder.glob("*.ckpt")
    for manifest in (folder / UNFINISHED).glob(f"*/{IN_FOLDER}"):
        rest = manifest.parent
        if rest.name.endswith(".ckpt") or not (folder / rest.name.removesuffix(REPLACED)).exists():
            yield rest


def by_age(checkpoints: Iterable[Path]) -> list[Path]:
    """Newest first; what a link points to once."""
    present = {path.resolve() for path in checkpoints if path.exists()}
    return sorted(present, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def _of_callbacks(trainer: Trainer) -> Iterator[Path]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, OnExceptionCheckpoint):
            yield Path(callback.ckpt_path)
        elif isinstance(callback, ModelCheckpoint):
            # Lightning's own rule, of which it makes no public name.
            yield from in_folder(Path(callback._ModelCheckpoint__resolve_ckpt_dir(trainer)))  # type: ignore[attr-defined]


def _of_slurm(folder: Path) -> list[Path]:
    numbered = {
        int(match[1]): path
        for path in folder.glob("hpc_ckpt_*.ckpt")
        if (match := re.fullmatch(r"hpc_ckpt_(\d+)\.ckpt", path.name))
    }
    return [numbered[number] for number in sorted(numbered, reverse=True)]

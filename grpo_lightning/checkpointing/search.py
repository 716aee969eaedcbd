"""Where the checkpoints of a run lie, newest first, when the run looks for them itself."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from grpo_lightning.checkpointing.manifest import IN_FOLDER, step_of
from grpo_lightning.checkpointing.writing import REPLACED, UNFINISHED


def found_checkpoints(trainer: Trainer, ckpt_path: str | None) -> list[Path]:
    """The checkpoints that `ckpt_path` may mean, the first choice first. Nothing is said of whether they are whole.

    Args:
        trainer: Of the run, which need not be set up.
        ckpt_path: "last" for those in the folders of the run's `ModelCheckpoint` and `OnExceptionCheckpoint`, newest
            first; "hpc" for those that Lightning leaves when SLURM ends a job, and None for the same under SLURM.
    """
    if ckpt_path == "last":
        return newest_first(_of_callbacks(trainer))
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


def newest_first(checkpoints: Iterable[Path]) -> list[Path]:
    """By the optimizer steps behind them, then by when their files were written; what a link points to once.

    Those of which no steps are known, as an earlier version wrote them, come last.
    """
    present = {path.resolve() for path in checkpoints if path.exists()}
    steps = {path: step_of(path) for path in present}

    def age(path: Path) -> tuple[int, int, str]:
        step = steps[path]
        return -1 if step is None else step, path.stat().st_mtime_ns, path.name

    return sorted(present, key=age, reverse=True)


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

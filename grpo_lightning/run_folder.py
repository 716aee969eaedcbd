"""Where a run's artefacts lie."""

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from shutil import rmtree

from lightning.pytorch import Trainer

from grpo_lightning.types import ConfigurationError


def run_folder(trainer: Trainer) -> Path:
    """The folder of the first logger, or the Trainer's `default_root_dir` where nothing is logged to a folder.

    It is rank 0's folder on every rank, and the one that holds the command line's ``config.yaml``. A collective: call
    it on every rank, and once, early: where one rank alone has failed, nobody answers any more.

    Args:
        trainer: Set up, so that its ranks can talk to each other.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)


def set_aside(trainer: Trainer, *, in_use: Mapping[str, str | None]) -> Path | None:
    """Move an earlier run away that lies where a new one is about to write, so that neither loses anything.

    A run is a folder of the first logger with a ``config.yaml``; ``runs/name`` becomes ``runs/name.1``, or the next
    number that is free. Call it on one rank, before the first file is written.

    Args:
        trainer: Of the new run.
        in_use: By their settings, the folders that the new run reads.

    Returns:
        Where the earlier run is now; None where there was none.

    Raises:
        ConfigurationError: The new run reads what it would move.
    """
    log_dir = getattr(trainer.loggers[0], "log_dir", None) if trainer.loggers else None
    if log_dir is None or not (Path(log_dir) / "config.yaml").is_file():
        return None
    folder = Path(log_dir)
    for key, read in in_use.items():
        if read is not None and folder.resolve() in Path(read).resolve().parents:
            raise ConfigurationError(
                f"{key}: {read} lies in the folder of an earlier run, which this one would write to.\n"
                "Name another folder in trainer.logger."
            )
    earlier = next(path for n in count(1) if not (path := folder.with_name(f"{folder.name}.{n}")).exists())
    folder.rename(earlier)
    return earlier


def has_checkpoints(earlier: Path) -> bool:
    """Whether the run that has taken an earlier one's place has saved anything in its folder.

    Args:
        earlier: Where the earlier run is.
    """
    return any(_place_of(earlier).rglob("*.ckpt"))


def put_back(earlier: Path) -> None:
    """Undo what `set_aside` did, for a new run that ended before its first step: nothing of it stays.

    Args:
        earlier: Where the earlier run is.
    """
    folder = _place_of(earlier)
    if folder.exists():
        rmtree(folder)
    earlier.rename(folder)


def _place_of(earlier: Path) -> Path:
    """Where it was before `set_aside`."""
    return earlier.with_suffix("")

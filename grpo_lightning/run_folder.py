"""Where a run's artefacts lie."""

from pathlib import Path

from lightning.pytorch import Trainer


def run_folder(trainer: Trainer) -> Path:
    """The folder of the first logger, or the Trainer's `default_root_dir` where nothing is logged to a folder.

    It is rank 0's folder on every rank, and the one that holds the command line's ``config.yaml``. A collective: call
    it on every rank, and once, early: where one rank alone has failed, nobody answers any more.

    Args:
        trainer: Set up, so that its ranks can talk to each other.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)

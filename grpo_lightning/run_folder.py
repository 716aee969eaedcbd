"""Where a run's artefacts lie."""

from pathlib import Path
from typing import Any


def run_folder(trainer: Any) -> Path:
    """The folder of the first logger, or the Trainer's `default_root_dir` where nothing is logged."""
    for logger in trainer.loggers:
        if logger.log_dir:
            return Path(logger.log_dir)
    return Path(trainer.default_root_dir)

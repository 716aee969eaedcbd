"""Metrics in one CSV file that a resumed run goes on with."""

import csv
from typing import Any

from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger


class AppendingCSVLogger(CSVLogger):
    """Lightning's CSV logger, but a file that is there already is gone on with instead of being deleted.

    So the metrics of a run that was interrupted and resumed stand in one ``metrics.csv``; rows of steps that the run
    went through twice stand there twice, and are equal.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of the file."""
        if self._experiment is None:
            self._experiment = _AppendingWriter(self.log_dir)
        return self._experiment


class _AppendingWriter(_ExperimentWriter):
    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        if self._fs.isfile(self.metrics_file_path):
            with self._fs.open(self.metrics_file_path, "r", newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def log_hparams(self, params: dict[str, Any]) -> None:
        """The run's settings stand in ``config.yaml``."""

    def _check_log_dir_exists(self) -> None:
        """What is there stays there."""

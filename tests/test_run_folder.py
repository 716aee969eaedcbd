"""The run folder is the first logger's, or the Trainer's own."""

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger

from grpo_lightning.run_folder import run_folder


class Elsewhere(Logger):
    """Logs to a service, not to a folder."""

    name = "elsewhere"
    version = 0

    def log_metrics(self, metrics, step=None): ...

    def log_hyperparams(self, params, *args, **kwargs): ...


def trainer(folder: Path, *loggers: Logger) -> Trainer:
    return Trainer(accelerator="cpu", default_root_dir=folder, logger=list(loggers), enable_progress_bar=False)


def test_it_is_the_first_loggers(tmp_path: Path) -> None:
    first, second = CSVLogger(tmp_path / "a", name="run", version="x"), CSVLogger(tmp_path / "b")
    assert run_folder(trainer(tmp_path, first, second)) == tmp_path / "a" / "run" / "x"


def test_without_a_logger_it_is_the_trainers(tmp_path: Path) -> None:
    assert run_folder(trainer(tmp_path)) == tmp_path


def test_a_logger_without_a_folder_leaves_it_to_the_trainer(tmp_path: Path) -> None:
    assert run_folder(trainer(tmp_path, Elsewhere())) == tmp_path

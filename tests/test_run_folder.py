"""The run folder is the first logger's, or the Trainer's own."""

import re
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger

from grpo_lightning.run_folder import run_folder, set_aside
from grpo_lightning.types import ConfigurationError


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


def earlier_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed_everything: 0\n")
    return folder


def test_an_earlier_run_is_moved_away_whole(tmp_path: Path) -> None:
    new = trainer(tmp_path, CSVLogger(tmp_path, name="run", version=""))
    assert set_aside(new, in_use={}) is None
    for number in (1, 2):
        (earlier_run(tmp_path / "run") / "number").write_text(str(number))
        assert set_aside(new, in_use={"model.policy.path": str(tmp_path / "policy")}) == tmp_path / f"run.{number}"
        assert (tmp_path / f"run.{number}/number").read_text() == str(number)
        assert not (tmp_path / "run").exists()


def test_what_is_no_run_of_ours_stays(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert set_aside(trainer(tmp_path, CSVLogger(tmp_path, name="run", version="")), in_use={}) is None
    assert set_aside(trainer(tmp_path), in_use={}) is None
    assert (tmp_path / "run").is_dir()


@pytest.mark.parametrize("key", ["model.policy.path", "model.lora.from_adapter"])
def test_a_policy_within_the_earlier_run_is_not_moved_under_the_feet_of_its_reader(tmp_path: Path, key: str) -> None:
    run = earlier_run(tmp_path / "run")
    in_use = {"another": None, key: str(run / "policy")}
    with pytest.raises(ConfigurationError, match=rf"{re.escape(key)}: .* lies in the folder of an earlier run"):
        set_aside(trainer(tmp_path, CSVLogger(tmp_path, name="run", version="")), in_use=in_use)
    assert run.is_dir()

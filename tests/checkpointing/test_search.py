import os

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger

from grpo_lightning.checkpointing import found_checkpoints


def make(folder, *names):
    """Files, each newer than the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    for age, name in enumerate(names):
        (folder / name).write_text("")
        os.utime(folder / name, (age, age))


def trainer(folder, *callbacks, **settings):
    return Trainer(accelerator="cpu", default_root_dir=folder, logger=False, callbacks=[*callbacks], **settings)


def names(found):
    return [path.name for path in found]


def test_last_means_the_newest_in_the_folders_of_the_callbacks(tmp_path):
    make(tmp_path / "kept", "step=1.ckpt", "last.ckpt", "last.ckpt.manifest.json", "last.policy", "step=2.ckpt")
    make(tmp_path, "elsewhere.ckpt")
    (tmp_path / "on_exception.ckpt").write_text("")  # newest of all
    callbacks = ModelCheckpoint(tmp_path / "kept"), OnExceptionCheckpoint(tmp_path)
    found = found_checkpoints(trainer(tmp_path, *callbacks), "last")
    assert names(found) == ["on_exception.ckpt", "step=2.ckpt", "last.ckpt", "step=1.ckpt"]


def test_without_a_folder_of_its_own_it_is_the_loggers(tmp_path):
    make(tmp_path / "runs" / "name" / "version_0" / "checkpoints", "last.ckpt")
    logger = CSVLogger(tmp_path / "runs", "name", version=0)
    found = found_checkpoints(Trainer(accelerator="cpu", logger=logger, callbacks=[ModelCheckpoint()]), "last")
    assert names(found) == ["last.ckpt"]


def test_a_link_counts_as_what_it_points_to(tmp_path):
    make(tmp_path, "step=1.ckpt")
    (tmp_path / "last.ckpt").symlink_to("step=1.ckpt")
    assert names(found_checkpoints(trainer(tmp_path, ModelCheckpoint(tmp_path)), "last")) == ["step=1.ckpt"]


def test_a_folder_that_only_had_to_take_its_place_is_found_and_no_other_rest(tmp_path):
    for name, file in (("last.ckpt", "manifest.json"), ("torn.ckpt", "rest.pt")):
        make(tmp_path / ".unfinished" / name, file)
    found = found_checkpoints(trainer(tmp_path, ModelCheckpoint(tmp_path)), "last")
    assert found == [tmp_path / ".unfinished" / "last.ckpt"]


@pytest.mark.parametrize("under_slurm", [True, False])
def test_slurms_are_taken_by_their_number(tmp_path, monkeypatch, under_slurm):
    monkeypatch.setattr("grpo_lightning.checkpointing.search.SLURMEnvironment.detect", lambda: under_slurm)
    make(tmp_path, "hpc_ckpt_10.ckpt", "hpc_ckpt_9.ckpt", "hpc_ckpt_10.ckpt.manifest.json", "hpc_ckpt_11.policy")
    expected = ["hpc_ckpt_10.ckpt", "hpc_ckpt_9.ckpt"]
    assert names(found_checkpoints(trainer(tmp_path), "hpc")) == expected
    assert names(found_checkpoints(trainer(tmp_path), None)) == (expected if under_slurm else [])


@pytest.mark.parametrize("ckpt_path", ["last", None, "a.ckpt"])
def test_nothing_is_found_where_nothing_is_searched_or_is_there(tmp_path, ckpt_path):
    assert found_checkpoints(trainer(tmp_path, ModelCheckpoint(tmp_path)), ckpt_path) == []

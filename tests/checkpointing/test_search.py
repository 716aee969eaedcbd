import os

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger

from grpo_lightning.checkpointing import found_checkpoints
from grpo_lightning.checkpointing.manifest import IN_FOLDER, Content, content_of, write_manifest
from grpo_lightning.checkpointing.search import newest_first
from grpo_lightning.checkpointing.writing import write_file


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


class TestNewest:
    """By their steps, then by the times of their files."""

    @staticmethod
    def write(folder, steps):
        """Checkpoints by their names, each written after the one before, all in one second."""
        for age, (name, step) in enumerate(steps.items()):
            write_file(name, folder / name, global_step=step)
            os.utime(folder / name, (age, age))

    def test_a_copy_that_gives_files_other_times_changes_nothing(self, tmp_path):
        self.write(tmp_path, {"c.ckpt": 12, "b.ckpt": 9, "a.ckpt": 3})
        assert names(newest_first(tmp_path.glob("*.ckpt"))) == ["c.ckpt", "b.ckpt", "a.ckpt"]

    def test_of_the_same_step_the_one_written_last(self, tmp_path):
        self.write(tmp_path, {"b.ckpt": 9, "a.ckpt": 9, "c.ckpt": 8})
        assert names(newest_first(tmp_path.glob("*.ckpt"))) == ["a.ckpt", "b.ckpt", "c.ckpt"]

    def test_those_without_a_step_come_last_by_their_times(self, tmp_path):
        self.write(tmp_path, {"first.ckpt": 0, "b.ckpt": None, "a.ckpt": None})
        assert names(newest_first(tmp_path.glob("*.ckpt"))) == ["first.ckpt", "a.ckpt", "b.ckpt"]

    @pytest.mark.parametrize(("is_new", "expected"), [(True, ["a.ckpt", "b.ckpt"]), (False, ["b.ckpt", "a.ckpt"])])
    def test_a_save_that_was_cut_off_counts_as_what_is_there(self, tmp_path, is_new, expected):
        self.write(tmp_path, {"a.ckpt": 1, "b.ckpt": 2, "new.ckpt": 3})
        manifest = tmp_path / f"a.ckpt.{IN_FOLDER}"
        new, old = (
            {**vars(content_of(tmp_path / name)), "global_step": step}
            for name, step in (("new.ckpt", 3), ("a.ckpt", 1))
        )
        write_manifest(manifest, {"a.ckpt": [Content(**new), Content(**old)]})
        if is_new:
            (tmp_path / "new.ckpt").replace(tmp_path / "a.ckpt")
        assert names(newest_first([tmp_path / "a.ckpt", tmp_path / "b.ckpt"])) == expected

    def test_of_shards_one_file_has_the_step(self, tmp_path):
        self.write(tmp_path, {"b.ckpt": 5})
        folder = tmp_path / "a.ckpt"
        make(folder, "shard", "rest.pt")
        rest = Content(**{**vars(content_of(folder / "rest.pt")), "global_step": 6})
        write_manifest(folder / IN_FOLDER, {"shard": [content_of(folder / "shard")], "rest.pt": [rest]})
        assert names(newest_first(tmp_path.glob("*.ckpt"))) == ["a.ckpt", "b.ckpt"]


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

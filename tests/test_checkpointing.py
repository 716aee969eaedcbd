import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from grpo_lightning.checkpointing import PolicyExport, policy_folder, write_whole


def write_version(number):
    """Writes a folder of two files."""

    def write(folder):
        folder.mkdir()
        (folder / "weights").write_text(str(number))
        (folder / f"only_in_{number}").write_text("")

    return write


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


class TestWriteWhole:
    def test_makes_the_folder_and_those_above_it(self, tmp_path):
        write_whole(tmp_path / "a" / "b", write_version(1))
        assert names(tmp_path / "a" / "b") == ["only_in_1", "weights"]

    def test_replaces_the_folder_and_leaves_nothing_of_the_old_one(self, tmp_path):
        for number in (1, 2):
            write_whole(tmp_path / "policy", write_version(number))
        assert names(tmp_path / "policy") == ["only_in_2", "weights"]
        assert names(tmp_path) == ["policy"]

    def test_leaves_the_old_folder_as_it_was_when_the_new_one_cannot_be_finished(self, tmp_path):
        def break_off(folder):
            write_version(2)(folder)
            raise OSError("no space left")

        write_whole(tmp_path / "policy", write_version(1))
        with pytest.raises(OSError, match="no space left"):
            write_whole(tmp_path / "policy", break_off)
        assert (tmp_path / "policy" / "weights").read_text() == "1"
        assert names(tmp_path / "policy") == ["only_in_1", "weights"]

    def test_begins_anew_where_it_was_broken_off_before(self, tmp_path):
        unfinished = tmp_path / f".policy.{os.getpid()}"
        unfinished.mkdir()
        (unfinished / "rest").write_text("")
        write_whole(tmp_path / "policy", write_version(1))
        assert names(tmp_path / "policy") == ["only_in_1", "weights"]


class TestPolicyExport:
    @pytest.fixture
    def order(self):
        """What was written, in its order."""
        return []

    @pytest.fixture
    def export(self, order):
        def save_policy(folder, weights):
            folder.mkdir()
            (folder / "config.json").write_text("{}")
            order.append("policy")

        class Watched(TorchCheckpointIO):
            def save_checkpoint(self, checkpoint, path, storage_options=None):
                order.append("checkpoint")
                super().save_checkpoint(checkpoint, path, storage_options)

        return PolicyExport(Watched(), save_policy)

    def test_a_policy_lies_beside_its_checkpoint_before_it_is_there(self, export, order, tmp_path):
        export.save_checkpoint({"state_dict": {}, "step": 3}, tmp_path / "last.ckpt")
        assert order == ["policy", "checkpoint"]
        assert names(tmp_path) == ["last.ckpt", "last.policy"]
        assert torch.load(tmp_path / "last.ckpt") == {"state_dict": {}, "step": 3}
        assert export.load_checkpoint(tmp_path / "last.ckpt") == {"state_dict": {}, "step": 3}

    def test_both_are_removed_together(self, export, tmp_path):
        for name in ("a", "b"):
            export.save_checkpoint({"state_dict": {}}, tmp_path / f"{name}.ckpt")
        export.remove_checkpoint(str(tmp_path / "a.ckpt"))
        assert names(tmp_path) == ["b.ckpt", "b.policy"]

    def test_a_checkpoint_without_a_policy_is_removed_too(self, export, tmp_path):
        (tmp_path / "old.ckpt").write_text("")
        export.remove_checkpoint(tmp_path / "old.ckpt")
        assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("checkpoint", "folder"),
    [("last.ckpt", "last.policy"), ("runs/epoch=1-step=20.ckpt", "runs/epoch=1-step=20.policy")],
)
def test_a_policys_folder_has_its_checkpoints_name(checkpoint, folder):
    assert policy_folder(checkpoint) == Path(folder)

from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from grpo_lightning.checkpointing import PolicyExport, policy_folder, whole_checkpoint
from grpo_lightning.checkpointing.export import WholeFiles
from grpo_lightning.types import ConfigurationError


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


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

        class Watched(WholeFiles):
            def save_checkpoint(self, checkpoint, path, storage_options=None):
                order.append("checkpoint")
                super().save_checkpoint(checkpoint, path, storage_options)

        return PolicyExport(Watched(), save_policy, whole_checkpoint)

    def test_a_policy_lies_beside_its_checkpoint_before_it_is_there(self, export, order, tmp_path):
        export.save_checkpoint({"state_dict": {}, "step": 3}, tmp_path / "last.ckpt")
        assert order == ["policy", "checkpoint"]
        assert names(tmp_path) == ["last.ckpt", "last.ckpt.manifest.json", "last.policy"]
        assert torch.load(tmp_path / "last.ckpt") == {"state_dict": {}, "step": 3}
        assert export.load_checkpoint(tmp_path / "last.ckpt") == {"state_dict": {}, "step": 3}

    def test_both_are_removed_together(self, export, tmp_path):
        for name in ("a", "b"):
            export.save_checkpoint({"state_dict": {}}, tmp_path / f"{name}.ckpt")
        export.remove_checkpoint(str(tmp_path / "a.ckpt"))
        assert names(tmp_path) == ["b.ckpt", "b.ckpt.manifest.json", "b.policy"]

    def test_a_link_is_removed_without_the_manifest_of_what_it_points_to(self, export, tmp_path):
        export.save_checkpoint({"state_dict": {}}, tmp_path / "a.ckpt")
        (tmp_path / "last.ckpt").symlink_to("a.ckpt")
        export.remove_checkpoint(tmp_path / "last.ckpt")
        assert names(tmp_path) == ["a.ckpt", "a.ckpt.manifest.json", "a.policy"]

    def test_a_torn_checkpoint_is_not_loaded(self, export, tmp_path):
        path = tmp_path / "a.ckpt"
        export.save_checkpoint({"state_dict": {}}, path)
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ConfigurationError, match=r"a\.ckpt is torn"):
            export.load_checkpoint(path)

    def test_lightnings_files_get_a_manifest_also_where_they_are_written_in_a_thread(self, tmp_path):
        io = AsyncCheckpointIO(TorchCheckpointIO())
        export = PolicyExport(io, lambda folder, weights: folder.mkdir(), whole_checkpoint)
        for number in range(5):
            export.save_checkpoint({"state_dict": {"a": torch.zeros(100000)}, "step": number}, tmp_path / "a.ckpt")
        io.teardown()
        assert names(tmp_path) == ["a.ckpt", "a.ckpt.manifest.json", "a.policy"]
        assert export.load_checkpoint(tmp_path / "a.ckpt")["step"] == 4

    def test_what_a_user_has_files_written_by_is_left_alone(self):
        class Own(TorchCheckpointIO):
            pass

        assert type(PolicyExport(Own(), None, None).checkpoint_io) is Own

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

"""What every rank reads of a checkpoint, whichever strategy asks."""

from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from grpo_lightning.checkpointing import VerifiedCheckpoints, read_mapped


@pytest.fixture
def saved(tmp_path):
    torch.save({"weight": torch.arange(3)}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def no_folder(path, weights_only):
    pytest.fail("a file is no folder")


def test_a_file_is_mapped(saved):
    checkpoint = read_mapped(TorchCheckpointIO(), saved, read_folder=no_folder, weights_only=True)
    assert checkpoint["weight"].tolist() == [0, 1, 2]
    assert str(saved) in Path("/proc/self/maps").read_text()


def test_a_folder_is_read_as_the_strategy_wants(tmp_path):
    found = read_mapped(
        TorchCheckpointIO(),
        tmp_path,
        read_folder=lambda path, **settings: {"path": path, **settings},
        weights_only=True,
    )
    assert found == {"path": tmp_path, "weights_only": True}


def test_what_is_chosen_in_its_place_is_read(saved):
    verified = VerifiedCheckpoints(TorchCheckpointIO(), lambda path: path.with_name("last.ckpt"))
    torn = saved.with_name("torn.ckpt")
    assert read_mapped(verified, torn, read_folder=no_folder, weights_only=True)["weight"].tolist() == [0, 1, 2]

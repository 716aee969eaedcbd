import os
import re

import pytest

from grpo_lightning.checkpointing import check_destination
from grpo_lightning.types import ConfigurationError

POLICY = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
SHARDED = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "merges.txt"]
ADAPTER = ["adapter_config.json", "adapter_model.safetensors", "base_checksum.json", "made_by.json"]


def with_files(folder, names):
    folder.mkdir()
    for name in names:
        (folder / name).write_text("")
    return folder


def assert_refused(folder, said):
    with pytest.raises(ConfigurationError, match=rf"^model\.export_to.*{re.escape(said)}"):
        check_destination(folder, "model.export_to")


@pytest.mark.parametrize("names", [[], POLICY, SHARDED, ADAPTER], ids=["empty", "policy", "sharded", "adapter"])
def test_an_empty_folder_and_a_policy_may_be_replaced(tmp_path, names):
    check_destination(with_files(tmp_path / "policy", names), "model.export_to")


def test_folders_that_are_not_there_yet_may_be_made(tmp_path):
    check_destination(tmp_path / "a" / "b" / "policy", "model.export_to")


@pytest.mark.parametrize(
    ("names", "named"),
    [
        ([*POLICY, "notes.txt"], "notes.txt"),
        ([*POLICY, ".git"], ".git"),
        (["thesis.tex"], "thesis.tex"),
        (["config.json"], "config.json"),
        (["model.safetensors"], "model.safetensors"),
    ],
)
def test_files_of_others_are_named(tmp_path, names, named):
    assert_refused(with_files(tmp_path / "policy", names), f"would be lost: {named}.")


def test_a_file_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("")
    assert_refused(tmp_path / "run.yaml", "is no folder")


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("")
    assert_refused(tmp_path / "run.yaml" / "a" / "policy", "run.yaml is no folder")


def test_an_empty_current_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(with_files(tmp_path / "here", []))
    assert_refused(tmp_path / "here", "must name a folder of its own")


@pytest.mark.parametrize("is_there", [True, False])
def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch, is_there):
    if is_there:
        with_files(tmp_path / "policy", POLICY)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path or not mode & os.W_OK)
    assert_refused(tmp_path / "policy", f"{tmp_path} is not writable")

from pathlib import Path

import pytest
import torch

from grpo_lightning.checkpointing import problem_of
from grpo_lightning.checkpointing.manifest import IN_FOLDER, content_of, read_manifest, write_manifest
from grpo_lightning.checkpointing.search import in_folder
from grpo_lightning.checkpointing.writing import (
    begin,
    clear,
    finish,
    finish_with_policy,
    prepare_policy,
    write_file,
    write_whole,
)
from grpo_lightning.types import ConfigurationError


def write_version(number):
    """Writes a folder of two files."""

    def write(folder):
        folder.mkdir()
        (folder / "config.json").write_text(str(number))
        (folder / f"model-{number}.safetensors").write_text("")

    return write


def write_folder(path, write):
    """Lets a folder take its place, whatever is there."""
    unfinished = begin(path)
    write(unfinished)
    finish(unfinished, path)


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


class Killed(BaseException):
    pass


@pytest.fixture
def killed(monkeypatch):
    """Does something and is killed when it comes to a step."""

    def do(step, function, *arguments):
        def die(*arguments, **settings):
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(step, die)
            with pytest.raises(Killed):
                function(*arguments)

    return do


class TestWriteWhole:
    def test_makes_the_folder_and_those_above_it(self, tmp_path):
        write_whole(tmp_path / "a" / "b", write_version(1))
        assert names(tmp_path / "a" / "b") == ["config.json", "model-1.safetensors"]

    def test_replaces_the_folder_and_leaves_nothing_of_the_old_one(self, tmp_path):
        for number in (1, 2):
            write_whole(tmp_path / "policy", write_version(number))
        assert names(tmp_path / "policy") == ["config.json", "model-2.safetensors"]
        assert names(tmp_path) == ["policy"]

    def test_leaves_the_old_folder_as_it_was_when_the_new_one_cannot_be_finished(self, tmp_path):
        def break_off(folder):
            write_version(2)(folder)
            raise OSError("no space left")

        write_whole(tmp_path / "policy", write_version(1))
        with pytest.raises(OSError, match="no space left"):
            write_whole(tmp_path / "policy", break_off)
        assert (tmp_path / "policy" / "config.json").read_text() == "1"
        assert names(tmp_path / "policy") == ["config.json", "model-1.safetensors"]

    def test_begins_anew_where_it_was_broken_off_before(self, tmp_path):
        unfinished = tmp_path / ".unfinished" / "policy"
        unfinished.mkdir(parents=True)
        (unfinished / "rest").write_text("")
        write_whole(tmp_path / "policy", write_version(1))
        assert names(tmp_path / "policy") == ["config.json", "model-1.safetensors"]

    def test_leaves_what_another_writes_beside(self, tmp_path):
        other = tmp_path / ".unfinished" / "other"
        other.mkdir(parents=True)
        write_whole(tmp_path / "policy", write_version(1))
        assert other.exists()

    @pytest.mark.parametrize("name", ["..", ".", "", "below/..", "below/../../here"])
    def test_the_current_folder_and_those_above_it_stay(self, tmp_path, monkeypatch, name):
        (tmp_path / "here" / "below").mkdir(parents=True)
        (tmp_path / "here" / "file").write_text("of a user")
        monkeypatch.chdir(tmp_path / "here")
        with pytest.raises(ConfigurationError, match="must name a folder of its own"):
            write_whole(Path(name), write_version(1))
        assert (tmp_path / "here" / "file").read_text() == "of a user"

    def test_what_is_no_policy_stays(self, tmp_path):
        (tmp_path / "file").write_text("of a user")
        with pytest.raises(ConfigurationError, match="is no folder"):
            write_whole(tmp_path / "file", write_version(1))
        assert names(tmp_path) == ["file"]


class TestWriteFile:
    def test_a_file_comes_with_its_size_and_sha256(self, tmp_path):
        path = tmp_path / "a.ckpt"
        write_file({"weight": torch.arange(10000)}, path)
        assert names(tmp_path) == ["a.ckpt", "a.ckpt.manifest.json"]
        assert torch.equal(torch.load(path)["weight"], torch.arange(10000))
        assert read_manifest(tmp_path / "a.ckpt.manifest.json") == {"a.ckpt": [content_of(path)]}

    @pytest.mark.parametrize("step", ["torch.save", "write_manifest", "finish", "os.fsync"])
    def test_whenever_a_save_is_cut_off_the_file_before_is_whole(self, tmp_path, killed, step):
        path = tmp_path / "a.ckpt"
        write_file(1, path)
        killed(f"grpo_lightning.checkpointing.writing.{step}", write_file, 2, path)
        assert (problem_of(path), torch.load(path)) == (None, 1)
        write_file(3, path)
        assert (problem_of(path), torch.load(path)) == (None, 3)
        assert names(tmp_path) == ["a.ckpt", "a.ckpt.manifest.json"]

    def test_cut_off_when_it_has_taken_its_place_the_new_file_is_whole(self, tmp_path, killed):
        path = tmp_path / "a.ckpt"
        write_file(1, path)
        killed("grpo_lightning.checkpointing.writing._sync", write_file, 2, path)
        assert (problem_of(path), torch.load(path)) == (None, 2)

    def test_a_file_of_an_earlier_version_is_whole_until_it_is_replaced(self, tmp_path, killed):
        path = tmp_path / "a.ckpt"
        torch.save(1, path)
        killed("grpo_lightning.checkpointing.writing.finish", write_file, 2, path)
        assert (problem_of(path), torch.load(path)) == (None, 1)

    def test_a_link_is_replaced_and_what_it_points_to_left_alone(self, tmp_path):
        write_file(1, tmp_path / "a.ckpt")
        (tmp_path / "last.ckpt").symlink_to("a.ckpt")
        assert problem_of(tmp_path / "last.ckpt") is None
        write_file(2, tmp_path / "last.ckpt")
        assert [torch.load(tmp_path / name) for name in ("a.ckpt", "last.ckpt")] == [1, 2]
        assert problem_of(tmp_path / "a.ckpt") is problem_of(tmp_path / "last.ckpt") is None

    def test_a_folder_and_a_file_take_each_others_place(self, tmp_path):
        path = tmp_path / "a.ckpt"
        write_folder(path, write_version(1))
        write_file(2, path)
        assert torch.load(path) == 2
        write_folder(path, write_version(3))
        assert names(path) == ["config.json", "model-3.safetensors"]
        assert names(tmp_path) == ["a.ckpt"], "the file's manifest went with it"


class TestFolders:
    """Of shards, whose manifest is written last."""

    @staticmethod
    def write(number):
        def write(folder):
            write_version(number)(folder)
            write_manifest(folder / IN_FOLDER, {"config.json": [content_of(folder / "config.json")]})

        return write

    @pytest.mark.parametrize(
        ("step", "version"),
        [
            ("pathlib.Path.rename", "1"),  # of the old folder, which is put aside
            ("pathlib.Path.replace", "2"),  # by the new one
            ("grpo_lightning.checkpointing.writing._sync", "2"),
            ("grpo_lightning.checkpointing.writing.remove", "2"),
        ],
    )
    def test_cut_off_between_two_names_one_version_is_whole_and_takes_its_place(self, tmp_path, killed, step, version):
        path = tmp_path / "last.ckpt"
        write_folder(path, self.write(1))
        unfinished = begin(path)
        self.write(2)(unfinished)
        killed(step, finish, unfinished, path)
        clear(tmp_path)
        assert (path / "config.json").read_text() == version
        assert problem_of(path) is None
        write_folder(path, self.write(3))
        assert names(tmp_path) == ["last.ckpt"]

    def test_cut_off_when_a_file_was_to_take_its_place_the_folder_is_found_and_takes_it_again(self, tmp_path, killed):
        path = tmp_path / "last.ckpt"
        write_folder(path, self.write(1))
        unfinished = begin(path)
        torch.save(2, unfinished)
        killed("pathlib.Path.replace", finish, unfinished, path)
        (found,) = in_folder(tmp_path)
        assert problem_of(found) is None
        clear(tmp_path)
        assert (path / "config.json").read_text() == "1"
        assert list(in_folder(tmp_path)) == [path]


class TestPairs:
    """A checkpoint and the policy beside it."""

    @staticmethod
    def save(folder, number):
        policy = prepare_policy(folder / "last.ckpt", write_version(number))
        write_file(number, folder / "last.ckpt", policy=policy)

    @staticmethod
    def policy(folder):
        """Whose it is; None where there is none."""
        weights = folder / "last.policy" / "config.json"
        return int(weights.read_text()) if weights.exists() else None

    @pytest.mark.parametrize("has_earlier", [True, False])
    @pytest.mark.parametrize(
        ("step", "version"),
        [
            ("begin", 1),
            ("clear", 1),
            ("torch.save", 1),
            ("write_manifest", 1),
            ("finish_with_policy", 1),
            ("finish", 1),
            ("_sync", 2),
            ("take_place", 2),
        ],
    )
    def test_whenever_a_save_is_cut_off_they_are_alike_and_stay_so(self, tmp_path, killed, has_earlier, step, version):
        path = tmp_path / "last.ckpt"
        if has_earlier:
            self.save(tmp_path, 1)
        killed(f"grpo_lightning.checkpointing.writing.{step}", self.save, tmp_path, 2)
        expected = version if has_earlier or version == 2 else None
        assert (torch.load(path) if path.exists() else None) == expected
        assert self.policy(tmp_path) in (None, expected)
        clear(tmp_path)
        assert self.policy(tmp_path) == expected
        self.save(tmp_path, 3)
        assert (torch.load(path), self.policy(tmp_path)) == (3, 3)
        assert names(tmp_path) == ["last.ckpt", "last.ckpt.manifest.json", "last.policy"]

    @pytest.mark.parametrize(
        ("step", "version"),
        [
            ("grpo_lightning.checkpointing.writing.finish", 1),
            ("pathlib.Path.replace", 2),  # the shards are whole, and nothing is in their place
            ("grpo_lightning.checkpointing.writing._sync", 2),
        ],
    )
    def test_so_are_shards_and_their_policy(self, tmp_path, killed, step, version):
        path = tmp_path / "last.ckpt"

        def prepared(number):
            policy, unfinished = prepare_policy(path, write_version(number)), begin(path)
            TestFolders.write(number)(unfinished)
            return unfinished, path, policy

        finish_with_policy(*prepared(1))
        killed(step, finish_with_policy, *prepared(2))
        clear(tmp_path)
        assert ((path / "config.json").read_text(), self.policy(tmp_path)) == (str(version), version)

    def test_one_that_another_thread_will_place_is_not_cleared_away(self, tmp_path):
        later = prepare_policy(tmp_path / "last.ckpt", write_version(2))
        self.save(tmp_path, 1)
        assert self.policy(tmp_path) == 1
        write_file(2, tmp_path / "last.ckpt", policy=later)
        assert self.policy(tmp_path) == 2

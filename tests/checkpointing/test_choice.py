import os
import warnings

import pytest

from grpo_lightning.checkpointing import choice, make_room, whole_checkpoint
from grpo_lightning.checkpointing.writing import write_file
from grpo_lightning.types import ConfigurationError


@pytest.fixture
def checkpoints(tmp_path):
    """Three, newest first."""
    paths = [tmp_path / f"{name}.ckpt" for name in ("c", "b", "a")]
    for age, path in enumerate(paths):
        write_file(path.name, path)
        os.utime(path, (1000 - age, 1000 - age))
    return paths


def tear(path):
    path.write_bytes(path.read_bytes()[:-1])


def test_the_newest_is_taken_in_silence(checkpoints):
    with warnings.catch_warnings(action="error"):
        assert whole_checkpoint(checkpoints[0], checkpoints) == checkpoints[0]


def test_torn_ones_are_skipped_and_each_is_said(checkpoints):
    for path in checkpoints[:2]:
        tear(path)
    with pytest.warns(UserWarning, match=r"skipped.*\.ckpt is torn: it has") as said:
        assert whole_checkpoint(checkpoints[0], checkpoints) == checkpoints[2]
    assert [message.message.args[0][:20] for message in said] == ["The checkpoint c.ckp", "The checkpoint b.ckp"]


def test_where_all_are_torn_nothing_is_begun(checkpoints):
    for path in checkpoints:
        tear(path)
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ConfigurationError, match="none of the 3 check"):
        whole_checkpoint(checkpoints[0], checkpoints)


def test_one_that_was_named_is_refused_with_the_newest_that_could_be_taken(checkpoints):
    for path in checkpoints[:2]:
        tear(path)
    with pytest.raises(ConfigurationError, match=r"^ckpt_path: .*b\.ckpt is torn.*\nThe newest .* is a\.ckpt\.$"):
        whole_checkpoint(checkpoints[1])


def test_one_that_cannot_be_verified_is_taken_and_said(checkpoints, monkeypatch):
    said = []
    monkeypatch.setattr(choice, "rank_zero_info", said.append)
    checkpoints[0].with_name("c.ckpt.manifest.json").unlink()
    assert whole_checkpoint(checkpoints[0]) == checkpoints[0]
    assert "c.ckpt has no manifest: it cannot be verified" in said[0]


def test_torn_ones_make_room_with_their_manifests(checkpoints, tmp_path):
    (tmp_path / "b.ckpt.torn").write_text("of an earlier time")
    held = [path.read_bytes() for path in checkpoints]
    make_room(checkpoints[:2])
    kept = ["a.ckpt", "a.ckpt.manifest.json"]
    torn = [f"{name}.ckpt.torn{more}" for name in "bc" for more in ("", ".manifest.json")]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*kept, *torn]
    assert [(tmp_path / f"{name}.ckpt.torn").read_bytes() for name in "cb"] == held[:2]


def test_what_the_next_save_clears_away_is_left_to_it(tmp_path):
    rest = tmp_path / ".unfinished" / "last.ckpt"
    rest.mkdir(parents=True)
    make_room([rest])
    assert rest.is_dir()

"""A run that is killed in the middle of a save goes on from the newest checkpoint that is whole, bit for bit."""

import elastic
import pytest
import torch
from worlds import launch

from grpo_lightning.checkpointing.writing import _Hashed

WRITING, SHARDS = "grpo_lightning.checkpointing.writing:", "grpo_lightning.checkpointing.shards:"

# At which step of the second save, and after which update the run goes on. An iteration is two updates.
POINTS = {
    "before the policy is written": ("single", "grpo_lightning.policy.policy:Policy.save", 2, 2),
    "when the policy is written": ("single", WRITING + "clear", 2, 2),
    "in the middle of the file": ("single", WRITING + "_Hashed.write", None, 2),
    "when the file is written": ("single", WRITING + "write_manifest", 2, 2),
    "when its manifest is written": ("single", WRITING + "finish_with_policy", 2, 2),
    "when the policy before is put aside": ("single", WRITING + "finish", 2, 2),
    "when the file has taken its place": ("single", WRITING + "_sync", 2, 4),
    "before the policy takes its place": ("single", WRITING + "take_place", 2, 4),
    "before the other rank writes its shards": ("fsdp2_sharded", SHARDS + "state_dict_saver.save", -2, 2),
    "before the manifest of the shards": ("fsdp2_sharded", SHARDS + "write_manifest", 2, 2),
    "before the shards take their place": (
        "fsdp2_sharded",
        SHARDS + "finish_with_policy",
        2,
        4,
    ),  # they are whole, and found
    "when the shards before are put aside": ("fsdp2_sharded", WRITING + "Path.replace", 4, 4),
}


@pytest.fixture(scope="module")
def straight():
    return elastic.replay.run(**elastic.SETTINGS)[0]


@pytest.fixture
def number_of_writes(tmp_path, monkeypatch):
    """Of a save."""
    writes, write = [], _Hashed.write
    with monkeypatch.context() as patch:
        patch.setattr(_Hashed, "write", lambda file, data: (writes.append(None), write(file, data))[1])
        save = elastic.replay.SaveAt(4, tmp_path / "counted.ckpt")
        elastic.replay.run(**{**elastic.SETTINGS, "iterations": 1}, callbacks=[save])
    return len(writes)


def cases():
    """With shards, one in every run of the tests: a world of ranks takes ten seconds."""
    for name, point in POINTS.items():
        is_slow = point[0] != "single" and name != "when the shards before are put aside"
        yield pytest.param(*point, id=name, marks=pytest.mark.slow if is_slow else ())


@pytest.mark.parametrize(("strategy", "step", "number", "updates"), [*cases()])
def test_it_goes_on(tmp_path, straight, number_of_writes, strategy, step, number, updates):
    ranks = 1 if strategy == "single" else 2
    number = number or number_of_writes * 3 // 2
    with pytest.raises(AssertionError, match=r"exit codes \[.*-9"):
        launch(elastic.killed_in_a_save, tmp_path / "run", strategy, step, number, num_ranks=ranks)
    record = elastic.gone_on(tmp_path / "run" / "checkpoints")
    assert len(record.weights) == len(straight.weights) - updates
    if ranks == 1:
        assert all(map(torch.equal, record.weights, straight.weights[updates:]))
    else:
        torch.testing.assert_close(record.weights[-1], straight.weights[-1], rtol=0, atol=1e-4)

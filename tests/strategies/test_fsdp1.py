"""FSDP1 on two ranks, as far as it goes: the numbers of one process, and checkpoints that other strategies read."""

from functools import partial

import pytest
import replay
import torch
from transformers import AutoModelForCausalLM

from grpo_lightning.rollout import InProcessEngine
from grpo_lightning.strategies import FSDP2Strategy
from grpo_lightning.types import ConfigurationError

# The reference, live rollouts of ragged lengths, clipping, two updates per rollout and accumulation.
SETTINGS = {"dtype": "float64", "live": True, "num_epochs": 2, "accumulate": 2, "iterations": 3}
SAVED_AT = 4 + 2  # micro-batches: in the middle of the second iteration, whose experience the checkpoint holds
UPDATES_AFTER = 3
OTHERS = {
    "uneven": {**SETTINGS, "uneven": True, "gradient_checkpointing": True},
    "layerwise": {**SETTINGS, "engine": partial(InProcessEngine, gather="layerwise")},
    "validated": {**SETTINGS, "limit_val_batches": 1.0, "val_check_interval": 4, "num_sanity_val_steps": 1},
    "controlled": {"dtype": "float64", "is_controlled": True, "num_epochs": 2, "iterations": 4},
}


class EngineWithACopy(replay.RecordedEngine):
    has_copy = True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp1")


@pytest.fixture(scope="module")
def single(folder):
    """In one process, with a checkpoint of the middle."""
    return replay.told(**SETTINGS, save_at=[(SAVED_AT, folder / "single.ckpt")])


@pytest.fixture(scope="module")
def of_ranks(folder, single):
    """What two ranks have to tell of each run."""
    runs = {
        "whole": {**SETTINGS, "save_at": [(SAVED_AT, str(folder / "fsdp1.ckpt"))]},
        "resumed": {**SETTINGS, "ckpt_path": str(folder / "fsdp1.ckpt")},
        "from single": {**SETTINGS, "ckpt_path": str(folder / "single.ckpt")},
        "fsdp2": {**SETTINGS, "strategy": FSDP2Strategy(), "ckpt_path": str(folder / "fsdp1.ckpt")},
        "folder": {
            **SETTINGS,
            "strategy": FSDP2Strategy(checkpoint="sharded"),
            "save_at": [(SAVED_AT, str(folder / "fsdp2.ckpt"))],
        },
        "from folder": {**SETTINGS, "ckpt_path": str(folder / "fsdp2.ckpt")},
        **OTHERS,
    }
    told = replay.in_world(folder / "world", [{"strategy": "fsdp1", **run} for run in runs.values()], ranks=2)
    return dict(zip(runs, told, strict=True))


def assert_same_updates(mine, theirs):
    """Sums in another order: the gradient to 1e-12; Adam amplifies rounding where a gradient is nearly zero."""
    assert len(mine["weights"]) == len(theirs["weights"])
    assert float((mine["gradients"][0] - theirs["gradients"][0]).norm() / theirs["gradients"][0].norm()) < 1e-12
    moved = theirs["weights"][-1] - theirs["weights"][0]
    assert float((mine["weights"][-1] - theirs["weights"][-1]).norm() / moved.norm()) < 1e-8


def last_of(told):
    return {key: told[key][-UPDATES_AFTER:] for key in ("gradients", "weights")}


def test_gradients_weights_metrics_and_tokens_are_those_of_one_process(of_ranks, single):
    for rank in of_ranks["whole"]:
        assert_same_updates(rank, single)
        for mine, theirs in zip(rank["metrics"], single["metrics"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)  # logged in fp32
    drawn = {
        slot: rank["tokens"][4 * p : 4 * p + 4] for rank in of_ranks["whole"] for p, slot in enumerate(rank["slots"])
    }
    assert [ids for slot in sorted(drawn) for ids in drawn[slot]] == single["tokens"]


def test_the_ranks_hold_one_copy(of_ranks, single):
    parts = [rank["local_weights"] for rank in of_ranks["whole"]]
    assert sum(parts) == len(single["weights"][0])
    assert min(parts) > 0.25 * sum(parts)  # those around the blocks lie in one tensor with the reference's


@pytest.mark.parametrize("name", OTHERS)
def test_so_are_runs_with(name, of_ranks):
    one = replay.told(**{**OTHERS[name], "engine": None})
    for rank in of_ranks[name]:
        assert_same_updates(rank, one)


def test_a_run_goes_on_bit_for_bit(of_ranks):
    for after, before in zip(of_ranks["resumed"], of_ranks["whole"], strict=True):
        assert len(after["weights"]) == UPDATES_AFTER
        assert all(map(torch.equal, after["weights"], before["weights"][-UPDATES_AFTER:]))
        assert after["tokens"] == before["tokens"]


def test_a_run_of_one_process_goes_on(of_ranks, single):
    assert_same_updates(of_ranks["from single"][0], last_of(single))


def test_it_goes_on_under_fsdp2_and_from_its_shards(of_ranks, single):
    assert_same_updates(of_ranks["fsdp2"][0], last_of(single))
    assert_same_updates(of_ranks["from folder"][0], last_of(single))


def test_it_goes_on_in_one_process(folder, of_ranks):
    module, data, trainer, record = replay.make(**SETTINGS)
    trainer.fit(module, data, ckpt_path=folder / "fsdp1.ckpt")
    assert_same_updates(vars(record), last_of(of_ranks["whole"][0]))


def test_the_states_of_the_optimizer_are_those_of_one_process(folder, of_ranks):
    states = [torch.load(folder / f"{name}.ckpt")["optimizer_states"][0]["state"] for name in ("fsdp1", "single")]
    assert states[0].keys() == states[1].keys()
    for number, state in states[1].items():
        for name, value in state.items():
            torch.testing.assert_close(states[0][number][name], value, rtol=1e-9, atol=1e-12)


def test_the_export_beside_a_checkpoint_is_the_whole_policy(folder, of_ranks):
    model = AutoModelForCausalLM.from_pretrained(folder / "fsdp1.policy", dtype=torch.float64)
    saved = torch.load(folder / "fsdp1.ckpt")["state_dict"]
    assert all(torch.equal(saved[f"policy.model.{name}"], value) for name, value in model.state_dict().items())
    assert not any(name.startswith("reference.") for name in saved)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"precision": "bf16-mixed"}, "trainer.precision under fsdp1"),
        ({"max_tokens": 20}, "model.max_tokens_per_microbatch"),
        ({"engine": EngineWithACopy}, "model.engine"),
        ({"lora": {"rank": 2}}, "model.lora"),
        ({"compiled": {"backend": "eager"}}, "model.compile"),
        ({}, "trainer.strategy: fsdp1 needs two ranks"),
    ],
    ids=str,
)
def test_what_upstream_does_not_allow_is_refused(settings, key):
    module, data, trainer, _ = replay.make(strategy="fsdp1", **{**SETTINGS, **settings})
    with pytest.raises(ConfigurationError, match=key):
        trainer.fit(module, data)

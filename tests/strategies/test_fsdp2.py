"""FSDP2 on two ranks: the numbers of one process, and checkpoints that go from one strategy to another."""

from types import SimpleNamespace

import pytest
import replay
import torch
from transformers import AutoModelForCausalLM

from grpo_lightning.strategies.fsdp2 import blocks_of

# The reference, live rollouts of ragged lengths, clipping, two updates per rollout and accumulation.
SETTINGS = {"dtype": "float64", "live": True, "num_epochs": 2, "accumulate": 2, "iterations": 4}
SAVED_AT = 4 * 2 + 2  # micro-batches: in the middle of the third iteration, whose experience the checkpoint holds
UPDATES_AFTER = 3
ADAPTER = {**SETTINGS, "lora": {"rank": 3}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp2")


@pytest.fixture(scope="module")
def sharded(folder):
    """The whole run on two ranks, and a checkpoint of its middle."""
    return replay.two_ranks(
        folder / "sharded",
        strategy="fsdp2",
        **SETTINGS,
        save_at=[(1, str(folder / "first.ckpt")), (SAVED_AT, str(folder / "sharded.ckpt"))],
    )


@pytest.fixture(scope="module")
def single(folder):
    """The same in one process."""
    save = replay.SaveAt(SAVED_AT, folder / "single.ckpt")
    record, module = replay.run(**SETTINGS, callbacks=[save])
    return SimpleNamespace(record=record, module=module)


@pytest.fixture(scope="module")
def adapter(folder):
    """A run that trains an adapter alone, in one process."""
    record, _ = replay.run(**ADAPTER, callbacks=[replay.SaveAt(SAVED_AT, folder / "adapter_single.ckpt")])
    return vars(record)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def assert_same_updates(mine, theirs):
    """Sums in another order: the gradient to 1e-12; Adam amplifies rounding where a gradient is nearly zero."""
    assert relative(mine["gradients"][0], theirs["gradients"][0]) < 1e-12
    moved = theirs["weights"][-1] - theirs["weights"][0]
    assert float((mine["weights"][-1] - theirs["weights"][-1]).norm() / moved.norm()) < 1e-8


def test_gradients_weights_metrics_and_tokens_are_those_of_one_process(sharded, single):
    first, second = sharded
    assert_same_updates(first, vars(single.record))
    for mine, theirs in zip(first["metrics"], single.record.metrics, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)  # logged in fp32
    drawn = {slot: first["tokens"][p * 4 : p * 4 + 4] for p, slot in enumerate(first["slots"])}
    drawn |= {slot: second["tokens"][p * 4 : p * 4 + 4] for p, slot in enumerate(second["slots"])}
    completions = single.module.rollout.completions
    assert [ids for slot in sorted(drawn) for ids in map(tuple, drawn[slot])] == [c.token_ids for c in completions]


def test_each_rank_holds_half_of_the_weights(sharded, single):
    number = replay.weights(single.module).numel()
    assert sum(part["local_weights"] for part in sharded) == number
    # What does not divide by two leaves the second rank less.
    assert all(abs(part["local_weights"] - number / 2) < 0.01 * number for part in sharded)


def test_it_goes_on_bit_for_bit(folder, sharded):
    again = replay.two_ranks(folder / "again", strategy="fsdp2", **SETTINGS, ckpt_path=str(folder / "sharded.ckpt"))
    for after, before in zip(again, sharded, strict=True):
        assert len(after["weights"]) == UPDATES_AFTER
        assert all(map(torch.equal, after["weights"], before["weights"][-UPDATES_AFTER:]))
        assert after["metrics"] == before["metrics"][-UPDATES_AFTER:]
        assert after["tokens"] == before["tokens"]


def test_before_its_first_step_the_optimizer_has_no_states_and_gets_none(folder, sharded):
    assert torch.load(folder / "first.ckpt")["optimizer_states"][0]["state"] == {}
    first, _ = replay.two_ranks(folder / "anew", strategy="fsdp2", **SETTINGS, ckpt_path=str(folder / "first.ckpt"))
    assert all(map(torch.equal, first["weights"], sharded[0]["weights"]))
    assert len(first["weights"]) == len(sharded[0]["weights"])


def test_it_goes_on_in_one_process(folder, sharded):
    module, data, trainer, record = replay.make(**SETTINGS)
    trainer.fit(module, data, ckpt_path=folder / "sharded.ckpt")
    assert len(record.weights) == UPDATES_AFTER
    before = {key: sharded[0][key][-UPDATES_AFTER:] for key in ("gradients", "weights")}
    assert_same_updates(vars(record), before)


def test_a_run_of_one_process_goes_on_in_shards(folder, single):
    first, _ = replay.two_ranks(
        folder / "from_single", strategy="fsdp2", **SETTINGS, ckpt_path=str(folder / "single.ckpt")
    )
    assert len(first["weights"]) == UPDATES_AFTER
    before = {key: vars(single.record)[key][-UPDATES_AFTER:] for key in ("gradients", "weights")}
    assert_same_updates(first, before)


def test_the_states_of_the_optimizer_are_restored_by_name(folder, sharded, single):
    """Both checkpoints number the weights alike: what lies under a number has its shape, and nearly its value."""
    states = [torch.load(folder / f"{name}.ckpt")["optimizer_states"][0]["state"] for name in ("sharded", "single")]
    assert states[0].keys() == states[1].keys()
    for number, state in states[1].items():
        for name, value in state.items():
            torch.testing.assert_close(states[0][number][name], value, rtol=1e-9, atol=1e-12)


def test_the_export_beside_a_checkpoint_is_the_whole_policy(folder, sharded):
    model = AutoModelForCausalLM.from_pretrained(folder / "sharded.policy", dtype=torch.float64)
    saved = torch.load(folder / "sharded.ckpt")["state_dict"]
    assert all(torch.equal(saved[f"policy.model.{name}"], value) for name, value in model.state_dict().items())
    assert not any(name.startswith("reference.") for name in saved)


class TestAdapter:
    """A few trained weights among frozen ones, with layers and whole pieces that are computed again."""

    @pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
    def test_two_ranks_are_one_process_and_go_on_as_one(self, folder, adapter, strategy):
        path = folder / f"adapter_{strategy}.ckpt"
        first, _ = replay.two_ranks(
            folder / f"adapter_{strategy}",
            strategy=strategy,
            **ADAPTER,
            gradient_checkpointing=True,
            max_tokens=20 if strategy == "ddp" else None,
            save_at=[(SAVED_AT, str(path))],
        )
        assert_same_updates(first, adapter)
        checkpoints = [torch.load(p) for p in (path, folder / "adapter_single.ckpt")]
        assert checkpoints[0]["state_dict"].keys() == checkpoints[1]["state_dict"].keys()
        assert all("lora_" in name for name in checkpoints[0]["state_dict"])
        module, data, trainer, record = replay.make(**ADAPTER)
        trainer.fit(module, data, ckpt_path=path)
        assert_same_updates(vars(record), {key: adapter[key][-UPDATES_AFTER:] for key in ("gradients", "weights")})

    def test_a_run_of_one_process_goes_on_in_shards(self, folder, adapter):
        """The optimizer's states have numbers, which leave out what is frozen."""
        first, _ = replay.two_ranks(
            folder / "adapter_from", strategy="fsdp2", **ADAPTER, ckpt_path=str(folder / "adapter_single.ckpt")
        )
        assert_same_updates(first, {key: adapter[key][-UPDATES_AFTER:] for key in ("gradients", "weights")})


def test_the_blocks_are_the_models_layers():
    model = replay.TinyPolicy(torch.float32).load_model(seed=0)
    assert blocks_of(model) == list(model.model.layers)


def test_controllers_move_a_reference_in_shards(folder):
    """They mix policy and reference shard by shard; retirement and refill come along."""
    settings = {"dtype": "float64", "is_controlled": True, "num_epochs": 2, "iterations": 4}
    first, _ = replay.two_ranks(folder / "controlled", strategy="fsdp2", **settings)
    record, module = replay.run(**settings)
    assert module.has_moved_reference
    assert_same_updates(first, vars(record))

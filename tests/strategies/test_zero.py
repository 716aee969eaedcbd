"""ZeRO on two ranks: the numbers of one process, and checkpoints that go from one strategy to another.

DeepSpeed steps in fp32 whatever the model's precision, so the tolerances are those of fp32. It is run without a
compiler, as on a machine that has none.
"""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import replay
import torch
from transformers import AutoModelForCausalLM

from grpo_lightning.types import ConfigurationError

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="the extra deepspeed is not installed")

# The reference, live rollouts in which the second rank is done at once, clipping, a schedule, two updates per rollout,
# accumulation, and an iteration in which there is nothing to learn from.
SETTINGS = {
    "uneven": True,
    "num_epochs": 2,
    "accumulate": 2,
    "iterations": 4,
    "fails_in": 1,
    "schedule": {"warmup_steps": 2, "decay": "linear"},
}
SAVED_AT = 4 * 2 + 2  # micro-batches: in the middle of the third iteration, whose experience the checkpoint holds
UPDATES_AFTER = 3
SKIPPED = (2, 3)  # the updates of the second iteration

GRADIENT_TOLERANCE = {1: 1e-6, 2: 1e-6, 3: 5e-6}
WEIGHT_TOLERANCE = 1e-4  # of the update: Adam amplifies rounding where a gradient is nearly zero

# Each kind of stage in every run of the tests, each pair of stage and property with the slow ones: a world of two
# processes takes five seconds.
STAGES = [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]


def zero(stage, **settings):
    """Of `ZeROStrategy`; small weights are cut too, for there are no others."""
    more = {"zero_settings": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    return {"stage": stage, **more, **settings}


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.getbasetemp() / "extensions"))
    yield
    assert not (tmp_path_factory.getbasetemp() / "extensions").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def sharded(folder):
    """The whole run on two ranks, and a checkpoint of its middle, by stage."""
    runs = {}

    def get(stage):
        if stage not in runs:
            save_at = [(SAVED_AT, str(folder / f"{stage}.ckpt"))]
            runs[stage] = replay.two_ranks(folder / f"{stage}", zero=zero(stage), **SETTINGS, save_at=save_at)
        return runs[stage]

    return get


@pytest.fixture(scope="module")
def single(folder):
    """The same in one process."""
    record, module = replay.run(**SETTINGS, callbacks=[replay.SaveAt(SAVED_AT, folder / "single.ckpt")])
    return SimpleNamespace(record=record, module=module)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def assert_same_updates(mine, theirs, stage):
    assert relative(mine["gradients"][0], theirs["gradients"][0]) < GRADIENT_TOLERANCE[stage]
    moved = theirs["weights"][-1] - theirs["weights"][0]
    assert float((mine["weights"][-1] - theirs["weights"][-1]).norm() / moved.norm()) < WEIGHT_TOLERANCE


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_weights_metrics_and_tokens_are_those_of_one_process(sharded, single, stage):
    first, second = sharded(stage)
    assert_same_updates(first, vars(single.record), stage)
    for mine, theirs in zip(first["metrics"], single.record.metrics, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)  # policy/gradient_norm among them
    assert {len(ids) for ids in second["tokens"]} == {1}
    drawn = {
        slot: part["tokens"][p * 4 : p * 4 + 4] for part in (first, second) for p, slot in enumerate(part["slots"])
    }
    completions = single.module.rollout.completions
    assert [ids for slot in sorted(drawn) for ids in map(tuple, drawn[slot])] == [c.token_ids for c in completions]


@pytest.mark.parametrize("stage", STAGES)
def test_an_update_without_a_group_changes_nothing_and_leaves_no_gradient(sharded, stage):
    first, _ = sharded(stage)
    for update in SKIPPED:
        assert torch.equal(first["weights"][update], first["weights"][update - 1])
    assert not any(first["num_left"])
    assert len(first["gradients"]) == len(first["weights"]) - len(SKIPPED)


@pytest.mark.parametrize("stage", STAGES)
def test_each_rank_holds_its_share_of_the_weights(sharded, single, stage):
    number = replay.weights(single.module).numel()
    held = [part["local_weights"] for part in sharded(stage)]
    # What does not divide by two is filled up.
    assert held == ([number, number] if stage < 3 else [pytest.approx(number / 2, rel=0.01)] * 2)


@pytest.mark.parametrize("stage", STAGES)
def test_it_goes_on_bit_for_bit(folder, sharded, stage):
    before = sharded(stage)
    again = replay.two_ranks(folder / "again", zero=zero(stage), **SETTINGS, ckpt_path=str(folder / f"{stage}.ckpt"))
    for after, uninterrupted in zip(again, before, strict=True):
        assert len(after["weights"]) == UPDATES_AFTER
        assert all(map(torch.equal, after["weights"], uninterrupted["weights"][-UPDATES_AFTER:]))
        assert after["metrics"] == uninterrupted["metrics"][-UPDATES_AFTER:]
        assert after["tokens"] == uninterrupted["tokens"]
    for number, state in before[0]["optimizer"].items():
        assert all(torch.equal(again[0]["optimizer"][number][name], value) for name, value in state.items())


@pytest.mark.parametrize("stage", STAGES)
def test_it_goes_on_in_one_process(folder, sharded, stage):
    before = {key: sharded(stage)[0][key][-UPDATES_AFTER:] for key in ("gradients", "weights")}
    module, data, trainer, record = replay.make(**SETTINGS)
    trainer.fit(module, data, ckpt_path=folder / f"{stage}.ckpt")
    assert len(record.weights) == UPDATES_AFTER
    assert_same_updates(vars(record), before, stage)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_of_one_process_goes_on_in_shards(folder, single, stage):
    first, _ = replay.two_ranks(
        folder / "from_single", zero=zero(stage), **SETTINGS, ckpt_path=str(folder / "single.ckpt")
    )
    assert len(first["weights"]) == UPDATES_AFTER
    before = {key: vars(single.record)[key][-UPDATES_AFTER:] for key in ("gradients", "weights")}
    assert_same_updates(first, before, stage)


@pytest.mark.slow
def test_a_run_goes_from_one_stage_to_another_and_to_fsdp2(folder, sharded):
    before = {key: sharded(2)[0][key][-UPDATES_AFTER:] for key in ("gradients", "weights")}
    others = [
        {**other, **SETTINGS, "ckpt_path": str(folder / "2.ckpt")}
        for other in ({"zero": zero(3)}, {"strategy": "fsdp2"})
    ]
    for first, _ in replay.in_world(folder / "from_2", others, ranks=2):
        assert_same_updates(first, before, 3)


@pytest.mark.parametrize("stage", STAGES)
def test_the_states_of_the_optimizer_are_saved_as_without_zero(folder, sharded, single, stage):
    sharded(stage)
    saved, usual = (torch.load(folder / f"{name}.ckpt")["optimizer_states"][0] for name in (stage, "single"))
    assert saved["param_groups"] == usual["param_groups"]
    assert saved["state"].keys() == usual["state"].keys()
    for number, state in usual["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(saved["state"][number][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_the_export_beside_a_checkpoint_is_the_whole_policy(folder, sharded, stage):
    sharded(stage)
    model = AutoModelForCausalLM.from_pretrained(folder / f"{stage}.policy")
    saved = torch.load(folder / f"{stage}.ckpt")["state_dict"]
    assert all(torch.equal(saved[f"policy.model.{name}"], value) for name, value in model.state_dict().items())
    assert not any(name.startswith("reference.") for name in saved)


def test_a_precision_in_which_small_steps_are_lost_is_refused():
    module, data, trainer, _ = replay.make(ranks=1, strategy="deepspeed_2", precision="bf16-true")
    with pytest.raises(ConfigurationError, match=r"trainer.precision under deepspeed_2 .* got bf16-true"):
        trainer.fit(module, data)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_computed_in_half_precision_goes_on_bit_for_bit(folder, stage):
    settings = {"zero": zero(stage), "precision": "bf16-mixed", **SETTINGS}
    checkpoint = str(folder / "half.ckpt")
    runs = [{**settings, "save_at": [(SAVED_AT, checkpoint)]}, {**settings, "ckpt_path": checkpoint}]
    before, after = replay.in_world(folder / "half", runs, ranks=2)
    assert all(weight.dtype == torch.float32 for weight in torch.load(checkpoint)["state_dict"].values())
    assert all(map(torch.equal, after[0]["weights"], before[0]["weights"][-UPDATES_AFTER:]))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_adapter_is_trained_alone_and_goes_on_in_one_process(folder, stage):
    """With layers that are computed again, and pieces that are too, or under stage 3 are learned from one by one."""
    settings = {"live": True, "num_epochs": 2, "accumulate": 2, "iterations": 4, "lora": {"rank": 3}}
    again = {"gradient_checkpointing": True, "max_tokens": 20}
    path = folder / f"adapter_{stage}.ckpt"
    first, _ = replay.two_ranks(
        folder / "adapter", zero=zero(stage), **settings, **again, save_at=[(SAVED_AT, str(path))]
    )
    record, _ = replay.run(**settings)
    assert_same_updates(first, vars(record), stage)
    assert all("lora_" in name for name in torch.load(path)["state_dict"])
    module, data, trainer, resumed = replay.make(**settings)
    trainer.fit(module, data, ckpt_path=path)
    after = {key: vars(record)[key][-UPDATES_AFTER:] for key in ("gradients", "weights")}
    assert_same_updates(vars(resumed), after, stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_controllers_move_the_reference(folder, stage):
    """They mix policy and reference share by share; small weights of stage 3 are kept whole, as by default."""
    settings = {"is_controlled": True, "num_epochs": 2, "iterations": 4}
    first, _ = replay.two_ranks(folder / "controlled", zero={"stage": stage}, **settings)
    record, module = replay.run(**settings)
    assert module.has_moved_reference
    assert_same_updates(first, vars(record), stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_offloaded_steps_alike(folder, single, stage):
    first, _ = replay.two_ranks(folder / "offload", zero=zero(stage, offload=True), **SETTINGS)
    assert_same_updates(first, vars(single.record), stage)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [zero(2), zero(3), {"stage": 3}], ids=["2", "3", "3, kept whole"])
def test_evaluation_between_updates_disturbs_nothing(folder, settings):
    evaluated = {"live": True, "limit_val_batches": 1.0, "check_val_every_n_epoch": 1, "iterations": 5}
    first, _ = replay.two_ranks(folder / "evaluated", zero=settings, **evaluated)
    record, _ = replay.run(**evaluated)
    assert_same_updates(first, vars(record), settings["stage"])

"""Runs that train an adapter: what they learn, what they save, and how they go on."""

import peft
import pytest
import replay
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from replay import SaveAt
from test_learning import train
from test_resuming import Crash, assert_goes_on, resumed

from grpo_lightning.callbacks.reference_average import ReferenceAverage
from grpo_lightning.callbacks.reference_refresh import ReferenceRefresh
from grpo_lightning.callbacks.run_summary import RunSummary, commands
from grpo_lightning.callbacks.throughput import Throughput
from grpo_lightning.types import ConfigurationError

SETTINGS = {"num_epochs": 2, "accumulate": 2, "iterations": 6, "live": True, "lora": {"rank": 2}}
MIDDLE = 4 * 2 + 3  # in micro-batches: in the last accumulation window of the third iteration


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def straight(folder):
    """The uninterrupted run, and a checkpoint of its middle."""
    return replay.run(**SETTINGS, callbacks=[SaveAt(MIDDLE, folder / "a.ckpt")])


def test_it_learns_what_is_rewarded():
    # The head too: on a random one of this size, no state makes a token much more likely than others.
    lora = {"rank": 4, "alpha": 32, "targets": ["v_proj", "down_proj", "lm_head"]}
    before, after = train(1, is_shuffled=False, max_steps=30, lr=3e-2, lora=lora)
    assert before < 0.2  # one of twelve characters by chance
    assert after > 0.8


def test_the_reference_is_the_model_that_the_run_began_with(straight):
    """The divergence is 0 until the first update, and what is frozen has not moved."""
    record, module = straight
    assert record.metrics[0]["policy/kl"] == 0
    assert record.metrics[-1]["policy/kl"] > 1e-3
    expected = replay.TinyPolicy(torch.float32).load_model(seed=3)
    assert all(map(torch.equal, frozen(module), expected.parameters()))


def frozen(module):
    return [p for p in module.policy.parameters() if not p.requires_grad]


def test_the_checkpoint_holds_what_is_trained_alone(folder, straight):
    checkpoint = torch.load(folder / "a.ckpt")
    trained = {n for n, p in straight[1].named_parameters() if p.requires_grad}
    assert set(checkpoint["state_dict"]) == trained
    assert len(checkpoint["optimizer_states"][0]["state"]) == len(trained)


def test_interrupted_in_the_middle_of_an_iteration_it_goes_on_bit_for_bit(folder, straight):
    record, _, _ = resumed(folder / "a.ckpt", **SETTINGS)
    assert len(record.weights) == 2 * SETTINGS["iterations"] - MIDDLE // 2
    for mine, theirs in zip(record.weights, straight[0].weights[-len(record.weights) :], strict=True):
        assert torch.equal(mine, theirs)
    assert record.metrics == straight[0].metrics[-len(record.metrics) :]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # the resumed run goes on in the same folder
def test_killed_it_goes_on_bit_for_bit(tmp_path, straight):
    keep = ModelCheckpoint(dirpath=tmp_path, save_on_exception=True, every_n_train_steps=10**6)
    with pytest.raises(KeyError):
        replay.run(**SETTINGS, callbacks=[keep, Crash(1)], enable_checkpointing=True)
    (path,) = tmp_path.glob("*.ckpt")
    again = ModelCheckpoint(dirpath=tmp_path, save_on_exception=True, every_n_train_steps=10**6)
    assert_goes_on(resumed(path, **SETTINGS, callbacks=[again], enable_checkpointing=True)[0], straight[0])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_adapter_lies_beside_the_checkpoint(folder, straight):
    base = replay.TinyPolicy(torch.float32).load_model(seed=3)
    loaded = peft.PeftModel.from_pretrained(base, folder / "a.policy")
    saved = torch.load(folder / "a.ckpt")["state_dict"]
    for name, weight in loaded.named_parameters():
        if "lora_" in name:
            assert torch.equal(weight, saved[name.replace("base_model.model.", "policy.model.")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": None}, r"model\.lora: policy\.model\.lm_head\.weight is absent in the checkpoint"),
        ({"lora": {"rank": 3}}, r"model\.lora: .*lora_A.* of shape \(2, 64\) in the checkpoint and of shape \(3, 64\)"),
        ({"dtype": "float64"}, r"--ckpt_path: .* adapter .* on other weights than those of model\.policy"),
    ],
    ids=["full", "another rank", "another model"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(folder, straight, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        resumed(folder / "a.ckpt", **{**SETTINGS, **changes})


@pytest.mark.parametrize("controller", [ReferenceRefresh(every_n_steps=1), ReferenceAverage()], ids=type)
def test_a_reference_without_weights_of_its_own_is_not_moved(controller):
    with pytest.raises(ConfigurationError, match=rf"trainer\.callbacks: {type(controller).__name__} .* model\.lora"):
        replay.run(**SETTINGS, callbacks=[controller])


def test_the_summary_says_how_much_is_trained(tmp_path):
    facts = RunSummary()
    settings = {**SETTINGS, "iterations": 1}
    module, data, trainer, _ = replay.make(**settings, callbacks=[facts], default_root_dir=tmp_path)
    trainer.fit(module, data)
    summary = facts._facts(trainer, module, is_interrupted=False)
    # Four matrices of 16 x 16 and three of 16 x 64, in two layers.
    assert summary["trained_parameters"] == 2 * 2 * (4 * 32 + 3 * 80)
    assert summary["parameters"] == replay.weights(module).numel()


def test_the_commands_after_a_run_merge_the_adapter_and_evaluate_it_without_another(folder, straight, tmp_path):
    straight[1].export_policy(tmp_path / "policy")
    (tmp_path / "config.yaml").touch()
    lines = commands(tmp_path)
    assert lines["merge it:"] == f"grpo-lightning merge {tmp_path}/policy {tmp_path}/merged"
    assert lines["evaluate it:"].endswith("--model.lora=null")


@pytest.mark.filterwarnings("ignore:model.max_tokens_per_microbatch is")
def test_layers_that_are_computed_again_are_counted():
    class Logged(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.ratio = float(trainer.callback_metrics.get("throughput/recomputed_ratio", -1))

    for max_tokens, expected in ((None, 1 / 2), (20, 2 / 3)):
        logged = Logged()
        settings = {"iterations": 1, "gradient_checkpointing": True, "max_tokens": max_tokens}
        replay.run(**settings, callbacks=[Throughput(1.0, 1.0), logged])
        assert logged.ratio == pytest.approx(expected)

"""Averages of weights, against averages of the weights that the run recorded."""

import pytest
import replay
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from safetensors.torch import load_file
from stock.matrix import shows
from stock.runs import VALIDATED, exported, fit, flat

from grpo_lightning.callbacks.reference_average import ReferenceAverage
from grpo_lightning.callbacks.run_summary import RunSummary
from grpo_lightning.strategies import FSDP2Strategy, ZeROStrategy
from grpo_lightning.types import ConfigurationError

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
DECAY = 0.6
LORA = {"rank": 2, "alpha": 4}


def moving_average(weights):
    """After each update; the first begins it."""
    averages = [weights[0]]
    for new in weights[1:]:
        averages.append(DECAY * averages[-1] + (1 - DECAY) * new)
    return averages


def saving(folder):
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)


def load(folder, step):
    return torch.load(folder / f"step={step}.ckpt", weights_only=True)


class Seen(Callback):
    """The policy's weights while it is validated."""

    def __init__(self):
        self.weights = []

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.weights.append(replay.weights(pl_module))


@shows("Callbacks", "EMAWeightAveraging")
def test_a_moving_average_is_validated_saved_and_exported_and_training_goes_on_without_it(tmp_path, claim):
    plain, _, _ = fit(iterations=6)
    seen = Seen()
    callbacks = [saving(tmp_path), seen, EMAWeightAveraging(decay=DECAY)]
    record, module, _ = fit(
        iterations=6, callbacks=callbacks, enable_checkpointing=True, val_check_interval=2, **VALIDATED
    )
    expected = moving_average(plain.weights)
    # Bitwise: the average is swapped in and out again, and never trained.
    assert all(torch.equal(a, b) for a, b in zip(record.weights, plain.weights, strict=True))
    for number in range(6):
        saved = load(tmp_path, number + 1)
        # One multiplication and addition per update in fp32, of weights below 1.
        torch.testing.assert_close(flat(saved["state_dict"]), expected[number], rtol=0, atol=1e-6)
        assert torch.equal(flat(saved["current_model_state"]), plain.weights[number])
        folder = exported(tmp_path / f"step={number + 1}.policy")
        assert {f"policy.model.{name}" for name in folder} <= set(saved["state_dict"])
        assert all(torch.equal(weight, saved["state_dict"][f"policy.model.{n}"]) for n, weight in folder.items())
    for number, weights in zip((1, 1, 3, 3, 5, 5), seen.weights, strict=True):
        torch.testing.assert_close(weights, expected[number], rtol=0, atol=1e-6)
    torch.testing.assert_close(replay.weights(module), expected[-1], rtol=0, atol=1e-6)
    claim.works(
        "decay 0.6 over six updates: the average by hand in every checkpoint and its exported policy, in every "
        "validation and at the end of the run; the weights in training bitwise those of a run without it. A resumed "
        "run has the average of one that was not interrupted, with a reference, a moved one, or LoRA. Refused under "
        "strategies that shard, and for weights in half precision"
    )


@pytest.mark.parametrize("settings", [{}, {"lora": LORA}, {"is_controlled": True}], ids=["reference", "lora", "moved"])
def test_a_resumed_run_has_the_average_of_one_that_was_not_interrupted(tmp_path, settings):
    def run(steps, folder, **more):
        average = EMAWeightAveraging(decay=DECAY)
        return fit(iterations=steps, callbacks=[average, saving(folder)], enable_checkpointing=True, **settings, **more)

    run(6, tmp_path / "whole")
    run(3, tmp_path / "parts")
    run(6, tmp_path / "rest", ckpt_path=tmp_path / "parts/step=3.ckpt")
    one, other = load(tmp_path / "whole", 6), load(tmp_path / "rest", 6)
    for key in ("state_dict", "current_model_state"):
        assert one[key].keys() == other[key].keys()
        assert all(torch.equal(value, other[key][name]) for name, value in one[key].items())
    is_moved = any(name.startswith("reference.") for name in one["state_dict"])
    assert is_moved == settings.get("is_controlled", False)


def test_a_reference_that_has_moved_is_no_part_of_the_average(tmp_path):
    callbacks = [EMAWeightAveraging(decay=DECAY), ReferenceAverage(share=0.5, every_n_steps=2), saving(tmp_path)]
    fit(iterations=4, callbacks=callbacks, enable_checkpointing=True)
    saved = load(tmp_path, 4)
    names = [name for name in saved["state_dict"] if name.startswith("reference.")]
    assert names
    assert all(torch.equal(saved["state_dict"][name], saved["current_model_state"][name]) for name in names)


@shows("Callbacks", "WeightAveraging")
def test_the_mean_of_an_adapter_is_exported(tmp_path, claim):
    callbacks = [RunSummary(), saving(tmp_path), WeightAveraging()]
    _, module, _ = fit(
        iterations=4, lora=LORA, callbacks=callbacks, enable_checkpointing=True, default_root_dir=tmp_path / "run"
    )
    trained = {name for name, p in module.policy.named_parameters() if p.requires_grad}
    adapters = [load(tmp_path, step)["current_model_state"] for step in (1, 2, 3, 4)]
    assert {f"policy.{name}" for name in trained} == set(adapters[0])
    saved = load(tmp_path, 4)["state_dict"]
    assert set(saved) == set(adapters[0])
    for name, mean in saved.items():
        expected = torch.stack([adapter[name] for adapter in adapters]).mean(0)
        torch.testing.assert_close(mean, expected, rtol=0, atol=1e-6)
        final = module.policy.get_parameter(name.removeprefix("policy."))
        assert torch.equal(final, mean)
    for folder in (tmp_path / "step=4.policy", tmp_path / "run/policy"):
        on_disk = load_file(folder / "adapter_model.safetensors")
        assert len(on_disk) == len(saved)
        values = sorted(value.double().sum().item() for value in saved.values())
        assert sorted(value.double().sum().item() for value in on_disk.values()) == values
    claim.works(
        "four updates of a LoRA adapter: checkpoints, their exports and the policy that `RunSummary` exports hold the "
        "mean of the four, wherever the callback stands in the list"
    )


class CopyEngine(replay.RecordedEngine):
    """Has a copy of the weights, and notices where it is not the policy."""

    def setup(self, model, tokenizer, eos_token_ids):
        super().setup(model, tokenizer, eos_token_ids)
        self.model, self.num_sent, self.is_behind = model, 0, True

    def update_weights(self, named_tensors, version):
        self.named_tensors, self.is_behind = named_tensors, True

    def generate(self, requests, sampling, coordinates):
        if self.is_behind:
            self.copy = {name: tensor.clone() for name, tensor in self.named_tensors}
            self.num_sent, self.is_behind = self.num_sent + 1, False
        assert all(torch.equal(self.copy[name], tensor) for name, tensor in self.named_tensors)
        return super().generate(requests, sampling, coordinates)


@pytest.mark.parametrize("averages", [[], [EMAWeightAveraging(decay=DECAY)]], ids=["plain", "average"])
def test_an_engine_with_a_copy_of_the_weights_validates_the_average(monkeypatch, averages):
    monkeypatch.setattr(replay, "RecordedEngine", CopyEngine)
    _, module, _ = fit(iterations=3, callbacks=averages, val_check_interval=1, **VALIDATED)
    # Each iteration; and each validation, where it is of other weights than the next iteration.
    assert module.engine.num_sent == (6 if averages else 4)


@pytest.mark.parametrize("strategy", [FSDP2Strategy(), ZeROStrategy(stage=1)], ids=["fsdp2", "deepspeed_1"])
def test_shards_are_not_averaged(strategy):
    with pytest.raises(ConfigurationError, match=r"trainer.callbacks: EMAWeightAveraging .* trainer.strategy to auto"):
        fit(callbacks=[EMAWeightAveraging()], strategy=strategy)


def test_weights_in_half_precision_are_not_averaged():
    with pytest.raises(ConfigurationError, match=r"trainer.callbacks: an average .* float32, .* has bfloat16"):
        fit(callbacks=[EMAWeightAveraging()], dtype="bfloat16", lora=LORA)


def test_an_average_that_begins_late_says_what_stands_in_its_place(caplog):
    with caplog.at_level("INFO"):
        fit(iterations=1, callbacks=[EMAWeightAveraging(update_starting_at_step=5)])
    assert "until its first average" in caplog.text

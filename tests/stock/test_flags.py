"""Flags of the Trainer."""

from itertools import chain

import pytest
import replay
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from stock.matrix import shows
from stock.runs import VALIDATED, Steps, fit, rows, same

from grpo_lightning.types import ConfigurationError


class Prompts(Callback):
    """The prompts of every iteration."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append([prompt.index for prompt in pl_module.rollout.prompts])


@shows("Flags of the Trainer", "fast_dev_run")
def test_a_trial_run_makes_some_updates_validates_and_leaves_nothing(tmp_path, claim):
    logger = CSVLogger(tmp_path / "logs", name="", version="")
    validations = Steps("on_validation_epoch_end")
    checkpoints = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1, save_last=True)
    callbacks = [checkpoints, validations]
    settings = {"logger": logger, "enable_checkpointing": True, "default_root_dir": tmp_path, "limit_val_batches": 1.0}
    _, _, trainer = fit(iterations=8, callbacks=callbacks, fast_dev_run=2, **settings)
    assert trainer.global_step == 2
    assert validations.seen == [2]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigurationError, match=r"(?s)trainer.fast_dev_run: an epoch of 1 .* multiple of the 2"):
        fit(accumulate=2, fast_dev_run=True)
    claim.works(
        "two updates and a validation; no checkpoint, no exported policy, no log. Refused where it would end in the "
        "middle of an iteration"
    )


@shows("Flags of the Trainer", "overfit_batches")
def test_every_epoch_has_the_same_few_prompts(claim):
    prompts = Prompts()
    fit(iterations=6, callbacks=[prompts], overfit_batches=2)
    epochs = [sorted(prompts.seen[i] + prompts.seen[i + 1]) for i in (0, 2, 4)]
    assert epochs == [list(range(8))] * 3
    assert prompts.seen[0] != prompts.seen[2]
    everything = Prompts()
    fit(iterations=6, callbacks=[everything])
    assert sorted(chain(*everything.seen[:3])) == list(range(12))
    claim.works("2 of the 3 iterations of an epoch: the first 8 of 12 prompts in each of three epochs, and no others")


@shows("Flags of the Trainer", "max_epochs, limit_train_batches")
def test_epochs_end_where_they_are_said_to(claim):
    ends, cut = Steps("on_train_epoch_end"), Steps("on_train_epoch_end")
    fit(callbacks=[ends], max_epochs=2, max_steps=-1)
    prompts = Prompts()
    fit(callbacks=[cut, prompts], max_epochs=3, max_steps=-1, limit_train_batches=2)
    assert (ends.seen, cut.seen) == ([3, 6], [2, 4, 6])
    assert sorted(chain(*prompts.seen[:3])) == list(range(12))
    claim.works(
        "two epochs of three updates; three epochs of two, in which the prompts go on through the data from one to the "
        "next"
    )


@shows("Flags of the Trainer", "limit_val_batches")
def test_a_limited_validation_has_as_many_prompts(claim):
    _, _, trainer = fit(
        iterations=1, evaluation_batch_size=2, val_check_interval=1, **{**VALIDATED, "limit_val_batches": 2}
    )
    assert trainer.callback_metrics["validation/num_prompts"] == 4
    claim.works("2 batches of 2 prompts: 4 of the 6 held-out prompts")


@shows("Flags of the Trainer", "val_check_interval")
def test_validations_come_as_often_as_is_said(claim):
    seen = Steps("on_validation_epoch_end")
    fit(iterations=6, accumulate=2, callbacks=[seen], val_check_interval=4, **VALIDATED)
    assert seen.seen == [2, 4, 6]
    with pytest.raises(ConfigurationError, match=r"trainer.val_check_interval .* multiple of .* = 2, got 3"):
        fit(accumulate=2, val_check_interval=3, **VALIDATED)
    claim.works(
        "4, in micro-batches as Lightning counts, two per update: after updates 2, 4 and 6. Refused where it would "
        "fall inside an update"
    )


@shows("Flags of the Trainer", "check_val_every_n_epoch")
def test_validations_come_after_every_other_epoch(claim):
    seen = Steps("on_validation_epoch_end")
    fit(iterations=12, callbacks=[seen], limit_val_batches=1.0, check_val_every_n_epoch=2)
    assert seen.seen == [6, 12]
    claim.works("2: after updates 6 and 12 of epochs of three")


@shows("Flags of the Trainer", "num_sanity_val_steps")
def test_a_sanity_check_comes_first_and_leaves_the_run_alone(tmp_path, claim):
    plain, _, _ = fit(live=True, iterations=2)
    seen, logger = Steps("on_validation_batch_end"), CSVLogger(tmp_path, name="", version="")
    settings = {"num_sanity_val_steps": 2, "limit_val_batches": 1.0, "evaluation_batch_size": 2}
    checked, _, _ = fit(live=True, iterations=2, callbacks=[seen], logger=logger, **settings)
    assert seen.seen == [0, 0]
    assert same(checked.weights, plain.weights)
    assert not any("validation/num_prompts" in row for row in rows(tmp_path))
    claim.works("2: two batches before the first update, not logged; weights afterwards bitwise those of a run without")


@shows("Flags of the Trainer", "log_every_n_steps")
def test_metrics_are_logged_as_often_as_is_said(tmp_path, claim):
    fit(iterations=6, log_every_n_steps=3, logger=CSVLogger(tmp_path, name="", version=""))
    assert [row["step"] for row in rows(tmp_path) if "reward/mean" in row] == [2, 5]
    claim.works("3: the metrics of steps 2 and 5, of six updates")


@shows("Flags of the Trainer", "detect_anomaly")
def test_the_operation_that_makes_a_gradient_nan_is_named(claim):
    class Spoil(Callback):
        def on_fit_start(self, trainer, pl_module):
            norm = pl_module.policy.model.base_model.norm
            norm.register_forward_hook(lambda module, args, output: output + (output * 0).sqrt())

    with (
        pytest.warns(UserWarning, match="Error detected in SqrtBackward0"),
        pytest.raises(RuntimeError, match="Function 'SqrtBackward0' returned nan values"),
    ):
        fit(iterations=1, callbacks=[Spoil()], detect_anomaly=True)
    claim.works(
        "a square root at zero in the policy: the backward pass ends with “Function 'SqrtBackward0' returned nan”"
    )


@shows("Flags of the Trainer", "deterministic")
def test_two_runs_are_equal_bit_by_bit(claim):
    class Asks(Callback):
        def on_train_batch_start(self, *_):
            assert torch.are_deterministic_algorithms_enabled()

    one, _, _ = fit(live=True, iterations=3, deterministic=True, callbacks=[Asks()])
    other, _, _ = fit(live=True, iterations=3, deterministic=True)
    assert same(one.weights, other.weights)
    assert same(one.gradients, other.gradients)
    claim.works(
        "every operation of rollouts and updates has a deterministic form on a CPU; completions, gradients and weights "
        "of two runs bitwise equal"
    )


@shows("Flags of the Trainer", "benchmark")
def test_the_search_for_kernels_is_switched_on(claim):
    plain, _, _ = fit(iterations=1)
    seen = []

    class Asks(Callback):
        def on_train_batch_start(self, *_):
            seen.append(torch.backends.cudnn.benchmark)

    record, _, _ = fit(iterations=1, callbacks=[Asks()], benchmark=True)
    assert seen == [True]
    assert same(record.weights, plain.weights)
    claim.works("switched on in cuDNN while the run lasts; without a GPU nothing else changes")


@shows("Flags of the Trainer", "inference_mode")
def test_an_evaluation_under_either_mode_finds_the_same(claim):
    seen = []

    class Asks(Callback):
        def on_validation_batch_start(self, *_):
            seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))

    found = []
    for inference_mode in (True, False):
        settings = {"inference_mode": inference_mode, "callbacks": [Asks()], **VALIDATED}
        record, module, trainer = fit(live=True, iterations=3, val_check_interval=3, **settings)
        found.append((trainer.callback_metrics["validation/reward/mean"], record.weights[-1]))
        trainer.validate(module, replay.Sums(), verbose=False)
        found.append((trainer.callback_metrics["validation/reward/mean"], record.weights[-1]))
    assert all(torch.equal(one, other) for pair in found for one, other in zip(pair, found[0], strict=True))
    # Within `fit` Lightning has the mode of training alone.
    assert dict.fromkeys(seen) == dict.fromkeys([(False, False), (True, False)])
    assert seen[-1] == (False, False)
    claim.works("true and false: `validate` under that mode, with the metrics of the validation in `fit`")


@shows("Flags of the Trainer", "enable_progress_bar")
def test_without_a_bar_a_run_is_quiet(capsys, claim):
    fit(iterations=2)
    assert capsys.readouterr().out == ""
    fit(iterations=2, enable_progress_bar=True)
    assert "Epoch" in capsys.readouterr().out
    claim.works("false: nothing on stdout; true: a bar")


@shows("Flags of the Trainer", "barebones")
@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_a_bare_run_learns_the_same(claim):
    plain, _, _ = fit(iterations=3)
    # Callbacks that log are told that it does nothing.
    bare = {"barebones": True, "num_sanity_val_steps": None, "log_every_n_steps": None}
    record, _, trainer = fit(iterations=3, **bare)
    assert trainer.loggers == []
    assert same(record.weights, plain.weights)
    claim.works("no logger, no bar, no checkpoint; weights bitwise those of a run with them")


@shows("Flags of the Trainer", "gradient_clip_algorithm: value")
def test_every_element_of_the_gradient_is_cut(claim):
    limit = 1e-3
    settings = {"gradient_clip_val": limit, "gradient_clip_algorithm": "value", "optimizer": "SGD", "lr": 1.0}
    _, start, _ = fit(iterations=1, optimizer="SGD", lr=0.0)
    record, module, _ = fit(iterations=1, **settings)
    (gradient,) = record.gradients
    assert (gradient.abs() > limit).any()
    moved = replay.weights(start) - replay.weights(module)
    # A difference of weights below 1 in fp32.
    torch.testing.assert_close(moved, gradient.clamp(-limit, limit), rtol=0, atol=1e-7)
    claim.works("0.001 and plain gradient descent at learning rate 1: the weights move by the gradient, cut at 0.001")


class Precisions(Callback):
    """In which precision the policy computes in rollouts and in updates."""

    def __init__(self):
        self.seen = set()

    def on_fit_start(self, trainer, pl_module):
        layer = pl_module.policy.model.base_model.layers[0].mlp.gate_proj
        layer.register_forward_hook(lambda module, args, output: self.seen.add(output.dtype))


@shows("Flags of the Trainer", "precision: bf16-mixed")
def test_rollouts_and_updates_compute_in_bfloat16_and_step_in_single_precision(claim):
    precisions = Precisions()
    record, _, _ = fit(live=True, iterations=3, callbacks=[precisions], precision="bf16-mixed")
    assert precisions.seen == {torch.bfloat16}
    assert record.gradients[0].dtype == record.weights[0].dtype == torch.float32
    # bfloat16 has 8 bits: two orders of summation leave about 1e-2 of log-probabilities near -2.5.
    assert max(metrics["sampler/logprob_difference"] for metrics in record.metrics) < 2e-2
    claim.works(
        "rollouts and updates compute in bfloat16; weights, gradients and steps in float32; the sampler's and the "
        "update's log-probabilities apart by less than 0.02"
    )


@shows("Flags of the Trainer", "precision: 64-true")
def test_everything_computes_in_double_precision(claim):
    precisions = Precisions()
    record, _, _ = fit(live=True, iterations=2, callbacks=[precisions], precision="64-true")
    assert precisions.seen == {torch.float64}
    assert record.gradients[0].dtype == torch.float64
    assert max(metrics["sampler/logprob_difference"] for metrics in record.metrics) < 1e-12
    claim.works("rollouts, gradients and steps in float64; both log-probabilities within 1e-12")


@shows("Flags of the Trainer", "precision: 16-mixed")
def test_half_precision_without_a_gpu_is_said_to_be_another(claim):
    precisions = Precisions()
    with pytest.warns(
        UserWarning, match="AMP with fp16 is not supported on CPU. Using `precision='bf16-mixed'` instead"
    ):
        fit(live=True, iterations=1, callbacks=[precisions], precision="16-mixed")
    assert precisions.seen == {torch.bfloat16}
    claim.works("on a CPU Lightning takes bf16-mixed in its place, and says so; on a GPU it was not tried")

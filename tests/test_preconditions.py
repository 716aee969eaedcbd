from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
from copying import CopyingEngine

from grpo_lightning.batching import IterationShape
from grpo_lightning.groups import DropZeroVariance, DynamicSampling, KeepAll
from grpo_lightning.objective import Bypass, PassAtK, grpo
from grpo_lightning.preconditions import (
    check_alignment,
    check_configuration,
    check_draw_ahead,
    check_flags,
    check_limit,
    check_max_time,
    check_microbatch_limit,
    check_objective,
    check_sampling,
    check_trainer,
)
from grpo_lightning.rollout import InProcessEngine, VLLMServerEngine
from grpo_lightning.ticks import TickLoader
from grpo_lightning.types import ConfigurationError, SamplingParams

SHAPE = IterationShape(prompts_per_iteration=12, group_size=4, num_epochs=2, num_minibatches=3)


def loader(limit=1.0):
    """Five iterations of 12 micro-batches."""
    return TickLoader(num_iterations=5, num_updates=6, num_microbatches=2, limit=limit)


def trainer(**changes):
    """What the checks ask of a Trainer."""
    defaults = {
        "precision": "32-true",
        "reload_dataloaders_every_n_epochs": 0,
        "world_size": 2,
        "accumulate_grad_batches": 2,
        "limit_train_batches": 1.0,
        "max_steps": -1,
        "max_epochs": None,
        "val_check_interval": 1.0,
        "check_val_every_n_epoch": 1,
        "gradient_clip_val": None,
        "fast_dev_run": False,
        "overfit_batches": 0.0,
    }
    return SimpleNamespace(**{**defaults, **changes})


def test_settings_that_are_right_pass():
    check_configuration(grpo(), SamplingParams(), SHAPE, None, 0.1)
    check_sampling(SamplingParams())
    for limit in (None, 1):
        check_microbatch_limit(limit)
    check_trainer(trainer(), SHAPE)
    check_alignment(trainer(), loader())


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_a_failure_rate_is_a_share(rate):
    with pytest.raises(ConfigurationError, match=r"model.max_failure_rate must be in \[0, 1\], got"):
        check_configuration(grpo(), SamplingParams(), SHAPE, None, rate)


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ({"top_p": 0.9}, "model.sampling: .* top_p must be 1"),
        ({"top_k": 5}, "model.sampling: .* top_k null"),
        ({"temperature": 0.0}, "model.sampling.temperature must be > 0, got 0.0"),
        ({"temperature": float("nan")}, "model.sampling.temperature must be > 0, got nan"),
        ({"max_new_tokens": 0}, "model.sampling.max_new_tokens must be >= 1, got 0"),
    ],
)
def test_training_draws_something_from_the_full_distribution(setting, key):
    with pytest.raises(ConfigurationError, match=key):
        check_sampling(SamplingParams(**setting))


CORRECTED = replace(grpo(), correction=Bypass())


@pytest.mark.parametrize(
    ("engine", "groups", "objective", "message"),
    [
        (InProcessEngine(), KeepAll(), CORRECTED, r"InProcessEngine draws in the training process.* VLLMServerEngine"),
        (CopyingEngine(), KeepAll(), grpo(), r".* model\.objective\.correction is null\.\nSet it to TruncatedWeights"),
        (CopyingEngine(), DynamicSampling(2), CORRECTED, r"DynamicSampling draws .*\nSet model\.groups to DropZero"),
    ],
)
def test_drawing_ahead_needs_processors_and_a_correction_of_its_own(engine, groups, objective, message):
    with pytest.raises(ConfigurationError, match=rf"model\.draw_ahead: {message}"):
        check_draw_ahead(engine, groups, objective)


def test_drawing_ahead_takes_what_has_both():
    for engine in (CopyingEngine(), VLLMServerEngine(["http://a"])):
        check_draw_ahead(engine, DropZeroVariance(), CORRECTED)


def test_a_group_is_more_than_the_attempts_that_count_as_one():
    objective = replace(grpo(), advantage=PassAtK(k=4, threshold=1.0, epsilon=0.0), scale=None)
    with pytest.raises(ConfigurationError, match=r"model.objective.advantage.k must be less than model.group_size = 4"):
        check_objective(objective, SHAPE)
    with pytest.raises(ConfigurationError, match=r"model.objective.advantage.k"):
        check_configuration(objective, SamplingParams(), SHAPE, None, 0.1)


def test_a_micro_batch_has_room_for_a_token():
    with pytest.raises(ConfigurationError, match=r"model.max_tokens_per_microbatch must be >= 1 or null, got 0"):
        check_microbatch_limit(0)


@pytest.mark.parametrize("norm", [-1, -0.5, float("nan")])
def test_gradients_are_not_clipped_to_a_negative_norm(norm):
    with pytest.raises(ConfigurationError, match=rf"trainer.gradient_clip_val must be > 0, .* got {norm}"):
        check_trainer(trainer(gradient_clip_val=norm), SHAPE)
    for allowed in (0, 0.0, 1.0):
        check_trainer(trainer(gradient_clip_val=allowed), SHAPE)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"val_check_interval": 0}, "trainer.val_check_interval must be > 0, got 0"),
        ({"val_check_interval": 0.0}, "trainer.val_check_interval must be > 0, got 0.0"),
        ({"check_val_every_n_epoch": 0}, "trainer.check_val_every_n_epoch must be >= 1 or null, got 0"),
    ],
)
def test_validations_are_some_way_apart(changes, said):
    with pytest.raises(ConfigurationError, match=said):
        check_trainer(trainer(**changes), SHAPE)
    check_trainer(trainer(val_check_interval="00:01:00:00", check_val_every_n_epoch=None), SHAPE)


@pytest.mark.parametrize("key", ["max_steps", "max_epochs", "limit_train_batches"])
def test_a_run_has_something_to_train_on(key):
    with pytest.raises(ConfigurationError, match=rf"trainer\.{key} must be .* got 0: nothing would be trained"):
        check_flags(trainer(**{key: 0}))
    for allowed in (-1, 1) if key != "limit_train_batches" else (1, 0.5):
        check_flags(trainer(**{key: allowed}))


def test_a_share_of_an_epoch_is_not_less_than_a_batch():
    with pytest.raises(ConfigurationError, match=r"trainer\.limit_train_batches leaves none of an epoch's 60 batches"):
        check_alignment(trainer(limit_train_batches=0.01), loader(0.01))
    check_limit(trainer(limit_train_batches=0.1), 10)


@pytest.mark.parametrize("max_time", ["2s", {"sec": 2}])
def test_a_time_that_cannot_be_read_is_refused(max_time):
    with pytest.raises(ConfigurationError, match=r"trainer.max_time must be .* DD:HH:MM:SS"):
        check_max_time(max_time)


@pytest.mark.parametrize("max_time", [None, "00:00:00:02", {"seconds": 2}, timedelta(seconds=2)])
def test_a_time_that_lightning_reads_is_left_to_it(max_time):
    check_max_time(max_time)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_weights_are_not_stepped_in_half_precision(precision):
    with pytest.raises(ConfigurationError, match=f"trainer.precision must not be {precision}: .* set bf16-mixed"):
        check_trainer(trainer(precision=precision), SHAPE)


def test_prompts_are_not_loaded_anew_during_a_run():
    with pytest.raises(ConfigurationError, match=r"trainer.reload_dataloaders_every_n_epochs must be 0: .* got 2"):
        check_trainer(trainer(reload_dataloaders_every_n_epochs=2), SHAPE)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_prompts_are_shared_out_equally(world_size):
    check_trainer(trainer(world_size=world_size), SHAPE)  # 12 prompts over 3 minibatches: four each


@pytest.mark.parametrize("world_size", [3, 5, 8])
def test_prompts_that_cannot_be_shared_out_are_refused(world_size):
    expected = f"number of ranks = 3 x {world_size} = {3 * world_size}, got 12"
    with pytest.raises(ConfigurationError, match=f"model.prompts_per_iteration .*{expected}"):
        check_trainer(trainer(world_size=world_size), SHAPE)


def test_every_micro_batch_can_have_a_completion():
    # 12 prompts / 3 minibatches / 2 ranks = 2 groups of 4.
    check_trainer(trainer(accumulate_grad_batches=8), SHAPE)
    with pytest.raises(ConfigurationError, match=r"trainer.accumulate_grad_batches .* 8 completions .*, got 9"):
        check_trainer(trainer(accumulate_grad_batches=9), SHAPE)


@pytest.mark.parametrize("number", [0, -1])
def test_an_accumulation_of_nothing_is_refused(number):
    with pytest.raises(ConfigurationError, match=f"trainer.accumulate_grad_batches must be >= 1, got {number}"):
        check_trainer(trainer(accumulate_grad_batches=number), SHAPE)


@pytest.mark.parametrize("limit", [24, 0.4, 1.0, 1000])
def test_an_epoch_may_end_with_any_iteration(limit):
    check_alignment(trainer(), loader(limit))  # 60 micro-batches in all; 0.4 of them are 24


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"limit_train_batches": 18}, "trainer.limit_train_batches: an epoch of 18 .* got 18"),
        ({"limit_train_batches": 0.1}, "trainer.limit_train_batches: an epoch of 6 .* got 0.1"),
        ({"limit_train_batches": 1, "fast_dev_run": 1}, "trainer.fast_dev_run: an epoch of 1 .* got 1"),
        ({"limit_train_batches": 1, "overfit_batches": 1}, "trainer.overfit_batches: an epoch of 1 .* got 1"),
    ],
)
def test_an_epoch_that_ends_within_an_iteration_is_refused(changes, key):
    with pytest.raises(ConfigurationError, match=key):
        check_alignment(trainer(**changes), loader(changes["limit_train_batches"]))


@pytest.mark.parametrize("interval", [4, 0.5, 1.0, "00:00:10:00"])
def test_a_validation_may_begin_with_any_update(interval):
    check_alignment(trainer(val_check_interval=interval), loader())


@pytest.mark.parametrize("interval", [5, 0.25])  # 15 of 60
def test_a_validation_within_an_update_is_refused(interval):
    expected = rf"trainer.val_check_interval .*accumulate_grad_batches = 2, got {interval}\."
    with pytest.raises(ConfigurationError, match=expected):
        check_alignment(trainer(val_check_interval=interval), loader())

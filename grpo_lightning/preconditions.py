"""What must hold before a run begins. Each mistake is named by its YAML key, before any model is loaded."""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from grpo_lightning.batching import IterationShape
from grpo_lightning.groups import GroupFilter
from grpo_lightning.objective import Objective, PassAtK
from grpo_lightning.rollout import DrawsAhead, RolloutEngine
from grpo_lightning.ticks import TickLoader, share_of
from grpo_lightning.types import ConfigurationError, SamplingParams


def check_configuration(
    objective: Objective,
    sampling: SamplingParams,
    shape: IterationShape,
    max_tokens_per_microbatch: int | None,
    max_failure_rate: float,
) -> None:
    """What can be said of the model's settings before there is a Trainer.

    Raises:
        ConfigurationError: See `check_sampling`, `check_objective` and `check_microbatch_limit`; or the failure rate is
            no share.
    """
    check_sampling(sampling)
    check_objective(objective, shape)
    check_microbatch_limit(max_tokens_per_microbatch)
    if not 0 <= max_failure_rate <= 1:
        raise ConfigurationError(f"model.max_failure_rate must be in [0, 1], got {max_failure_rate}.")


def check_sampling(sampling: SamplingParams) -> None:
    """Training draws from the full distribution: that is the one whose log-probabilities the update asks for.

    Raises:
        ConfigurationError: It does not, or draws nothing.
    """
    if sampling.top_p != 1 or sampling.top_k is not None:
        raise ConfigurationError(
            "model.sampling: training draws from the full distribution, so top_p must be 1 and top_k null "
            f"(got {sampling.top_p} and {sampling.top_k}). For evaluation set model.evaluation.top_p."
        )
    if not sampling.temperature > 0:
        raise ConfigurationError(f"model.sampling.temperature must be > 0, got {sampling.temperature}.")
    if not sampling.max_new_tokens >= 1:
        raise ConfigurationError(f"model.sampling.max_new_tokens must be >= 1, got {sampling.max_new_tokens}.")


def check_microbatch_limit(max_tokens_per_microbatch: int | None) -> None:
    """The limit is a number of tokens, or there is none.

    Raises:
        ConfigurationError: It is less than one token.
    """
    if max_tokens_per_microbatch is not None and max_tokens_per_microbatch < 1:
        raise ConfigurationError(
            f"model.max_tokens_per_microbatch must be >= 1 or null, got {max_tokens_per_microbatch}."
        )


def check_objective(objective: Objective, shape: IterationShape) -> None:
    """A group can be divided: where k attempts are all of them, no completion is better than another.

    Raises:
        ConfigurationError: Every advantage would be 0.
    """
    if isinstance(objective.advantage, PassAtK) and objective.advantage.k >= shape.group_size:
        raise ConfigurationError(
            f"model.objective.advantage.k must be less than model.group_size = {shape.group_size}, "
            f"got {objective.advantage.k}."
        )


def check_draw_ahead(engine: RolloutEngine, groups: GroupFilter, objective: Objective) -> None:
    """What is drawn while the policy is updated comes from other weights, and older ones.

    Raises:
        ConfigurationError: The engine draws from the policy itself, or nothing makes up for the age of what it draws,
            or further rounds would have to wait for it.
    """
    if not isinstance(engine, DrawsAhead):
        raise ConfigurationError(
            f"model.draw_ahead: {type(engine).__name__} draws in the training process, whose processors the update "
            "needs. Set model.engine to VLLMServerEngine, or model.draw_ahead to false."
        )
    if objective.correction is None:
        raise ConfigurationError(
            "model.draw_ahead: completions are one iteration older than the policy that learns from them, and "
            "model.objective.correction is null.\nSet it to TruncatedWeights, as configs/algorithm/default.yaml does."
        )
    if groups.max_rounds > 1:
        raise ConfigurationError(
            f"model.draw_ahead: {type(groups).__name__} draws further rounds when the first one is scored, when the "
            "engine is busy with the next iteration.\nSet model.groups to DropZeroVariance, or draw_ahead to false."
        )


def check_trainer(trainer: Trainer, shape: IterationShape) -> None:
    """Every rank gets equally many prompts of a minibatch, and a completion at least for each of its micro-batches.

    Raises:
        ConfigurationError: The numbers do not divide; or see `check_flags`.
    """
    check_flags(trainer)
    check_division(shape, num_ranks=trainer.world_size, num_microbatches=trainer.accumulate_grad_batches)


def check_division(shape: IterationShape, *, num_ranks: int, num_microbatches: int) -> None:
    """The prompts of an iteration can be dealt out to ranks, and their completions to micro-batches.

    Args:
        shape: Of an iteration.
        num_ranks: Over all machines.
        num_microbatches: The Trainer's `accumulate_grad_batches`.

    Raises:
        ConfigurationError: The numbers do not divide.
    """
    divisor = shape.num_minibatches * num_ranks
    if shape.prompts_per_iteration % divisor:
        raise ConfigurationError(
            f"model.prompts_per_iteration must be divisible by model.num_minibatches x number of ranks = "
            f"{shape.num_minibatches} x {num_ranks} = {divisor}, got {shape.prompts_per_iteration}."
        )
    completions = shape.prompts_per_iteration // divisor * shape.group_size
    if num_microbatches > completions:
        raise ConfigurationError(
            f"trainer.accumulate_grad_batches must be at most the {completions} completions of a minibatch on each "
            f"rank, got {num_microbatches}."
        )


def check_flags(trainer: Trainer) -> None:
    """The Trainer's own settings let something be trained, and in the way that its user expects.

    Raises:
        ConfigurationError: There is no step to be made, gradients are to be clipped to a negative norm, or the Trainer
            would load the data anew; or see `check_precision` and `check_intervals`.
    """
    check_precision(trainer.precision)
    check_intervals(trainer)
    _check_extent(trainer)
    if trainer.gradient_clip_val is not None and not trainer.gradient_clip_val >= 0:
        raise ConfigurationError(
            f"trainer.gradient_clip_val must be > 0, or 0 or null to clip nothing, got {trainer.gradient_clip_val}."
        )
    if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        raise ConfigurationError(
            "trainer.reload_dataloaders_every_n_epochs must be 0: the stream of prompts goes on over epochs by itself, "
            f"got {trainer.reload_dataloaders_every_n_epochs}."  # type: ignore[attr-defined]
        )
    if trainer.accumulate_grad_batches < 1:
        raise ConfigurationError(
            f"trainer.accumulate_grad_batches must be >= 1, got {trainer.accumulate_grad_batches}."
        )


def _check_extent(trainer: Any) -> None:
    """There is a step to be made."""
    for key in ("max_steps", "max_epochs"):
        if getattr(trainer, key) == 0:
            raise ConfigurationError(
                f"trainer.{key} must be >= 1, or -1 for no limit, got 0: nothing would be trained."
            )
    if not trainer.limit_train_batches > 0:
        raise ConfigurationError(
            f"trainer.limit_train_batches must be > 0, got {trainer.limit_train_batches}: nothing would be trained."
        )


def check_precision(precision: Any) -> None:
    """Weights are stepped in single precision at least.

    Args:
        precision: The Trainer's.

    Raises:
        ConfigurationError: Lightning would make them, and the optimizer's states, of half precision.
    """
    if precision in ("bf16-true", "16-true"):
        raise ConfigurationError(
            f"trainer.precision must not be {precision}: steps of usual learning rates are lost in weights of half "
            "precision. To compute in bfloat16, set bf16-mixed, or 32-true with compute_dtype: bfloat16 of "
            "trainer.strategy: fsdp2; to save memory, model.lora with model.policy.dtype: bfloat16."
        )


def check_intervals(trainer: Trainer) -> None:
    """Validations are some way apart.

    Raises:
        ConfigurationError: They are not.
    """
    interval, epochs = trainer.val_check_interval, trainer.check_val_every_n_epoch
    if isinstance(interval, int | float) and not interval > 0:
        raise ConfigurationError(
            f"trainer.val_check_interval must be > 0, got {interval}. "
            "To validate never, set trainer.limit_val_batches to 0."
        )
    if epochs is not None and epochs < 1:
        raise ConfigurationError(f"trainer.check_val_every_n_epoch must be >= 1 or null, got {epochs}.")


def check_max_time(max_time: Any) -> None:
    """The time after which Lightning stops a run can be read, before anything is built.

    Raises:
        ConfigurationError: It cannot.
    """
    try:
        Timer(duration=max_time)
    except (MisconfigurationException, TypeError) as error:
        raise ConfigurationError(
            "trainer.max_time must be days, hours, minutes and seconds as DD:HH:MM:SS, such as 00:01:30:00, or "
            f"a mapping such as {{minutes: 90}}, got {max_time!r}."
        ) from error


def check_alignment(trainer: Trainer, loader: TickLoader) -> None:
    """An epoch that the Trainer cuts short ends with an iteration, and a validation begins with an update's end.

    Raises:
        ConfigurationError: A limit or an interval in micro-batches falls into the middle, or nothing is left.
    """
    num_batches = loader.num_taken
    check_limit(trainer, len(loader))
    if num_batches % loader.ticks_per_iteration:
        key, value = _what_limits(trainer)
        raise ConfigurationError(
            f"trainer.{key}: an epoch of {num_batches} micro-batches would end in the middle of an iteration, got "
            f"{value}.\nIt must be a multiple of the {loader.ticks_per_iteration} micro-batches of an iteration."
        )
    interval = trainer.val_check_interval
    if isinstance(interval, int | float) and share_of(interval, num_batches) % trainer.accumulate_grad_batches:
        raise ConfigurationError(
            "trainer.val_check_interval counts micro-batches, or is a share of an epoch's, and must be a multiple of "
            f"trainer.accumulate_grad_batches = {trainer.accumulate_grad_batches}, got {interval}."
        )


def check_limit(trainer: Trainer, num_batches: int) -> None:
    """An epoch has something to be trained on.

    Args:
        trainer: Which may train on a share of it.
        num_batches: Of a whole epoch.

    Raises:
        ConfigurationError: The share is less than a batch.
    """
    if share_of(trainer.limit_train_batches, num_batches) < 1:
        key, value = _what_limits(trainer)
        raise ConfigurationError(f"trainer.{key} leaves none of an epoch's {num_batches} batches, got {value}.")


def _what_limits(trainer: Any) -> tuple[str, float]:
    """The setting that cut the epoch short, as its user knows it."""
    if trainer.fast_dev_run:
        return "fast_dev_run", trainer.fast_dev_run
    if trainer.overfit_batches:
        return "overfit_batches", trainer.overfit_batches
    return "limit_train_batches", trainer.limit_train_batches

"""Lightning's own callbacks: those that cannot do here what they are for, and what its averages of weights need."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    Checkpoint,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from grpo_lightning.types import ConfigurationError

REFUSED: dict[type[Callback], str] = {
    GradientAccumulationScheduler: (
        "a minibatch is cut into micro-batches before its first backward. Set trainer.accumulate_grad_batches."
    ),
    BatchSizeFinder: (
        "an update learns from all completions of its minibatch, whatever fits into memory at once. Set "
        "trainer.accumulate_grad_batches or model.max_tokens_per_microbatch; `grpo-lightning plan` computes the memory."
    ),
    LearningRateFinder: (
        "it looks for the learning rate at which the loss falls fastest, and GRPO's loss says nothing of how good the "
        "policy is. Set model.optimizer.init_args.lr, and watch reward/mean and policy/kl_old."
    ),
    StochasticWeightAveraging: (
        "it replaces model.schedule by one of epochs, and the policies beside checkpoints are not its average. Set "
        "WeightAveraging or EMAWeightAveraging."
    ),
    ModelPruning: "the pruned policy could not be exported: its weights get other names. Prune the exported policy.",
    BaseFinetuning: (
        "it freezes layers before the policy is loaded, and gives them to the optimizer without their schedule. Set "
        "model.lora to train a part of the policy."
    ),
}
"""By its class, why a callback cannot work, and what to set in its place."""


def admit(trainer: Trainer) -> None:
    """Refuse callbacks that would do harm, and let averages of weights act before the other callbacks.

    So those that evaluate or export the policy at the end of the run find the average, wherever they stand.

    Raises:
        ConfigurationError: A callback is refused, or there is an average of weights and they are in shards.
    """
    check_callbacks(trainer)
    save_nothing_of_a_trial(trainer)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    late = ("update_starting_at_step", "update_starting_at_epoch")
    for callback in callbacks:
        if isinstance(callback, EMAWeightAveraging) and any(getattr(callback, setting) for setting in late):
            rank_zero_info(
                f"{type(callback).__name__}: until its first average, validations and checkpoints have the weights "
                "that the run began with."
            )
    callbacks.sort(key=lambda callback: not isinstance(callback, WeightAveraging))


def save_nothing_of_a_trial(trainer: Any) -> None:
    """Leave out what saves checkpoints under `fast_dev_run`: Lightning's saves the last one even then.

    Args:
        trainer: Whose callbacks have not been called yet.
    """
    if trainer.fast_dev_run:
        trainer.callbacks[:] = [callback for callback in trainer.callbacks if not isinstance(callback, Checkpoint)]


def check_callbacks(trainer: Trainer) -> None:
    """The Trainer's callbacks can do here what they are for.

    Raises:
        ConfigurationError: See `admit`.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        for kind, reason in REFUSED.items():
            if isinstance(callback, kind):
                raise ConfigurationError(f"trainer.callbacks: {name} is not supported: {reason}")
        # Not asked for its placement: the ranks do not know each other yet.
        if isinstance(callback, WeightAveraging) and hasattr(type(trainer.strategy), "placement"):
            raise ConfigurationError(
                f"trainer.callbacks: {name} averages whole weights, which the ranks do not have under this "
                "trainer.strategy. Set trainer.strategy to auto or ddp."
            )


def averages_weights(trainer: Trainer) -> bool:
    """Whether a callback puts an average in the place of the policy's weights while it is validated, and at the end."""
    return any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def check_averaged(policy: nn.Module) -> None:
    """An average moves by small shares of a weight, which half precision rounds away.

    Raises:
        ConfigurationError: The policy has weights in half precision.
    """
    halves = {p.dtype for p in policy.parameters() if p.is_floating_point() and p.dtype.itemsize < 4}
    if halves:
        raise ConfigurationError(
            f"trainer.callbacks: an average of weights needs them in float32, and the policy has {_names(halves)}: set "
            "model.policy.dtype to float32 and trainer.precision to bf16-mixed."
        )


def keep_reference(checkpoint: dict[str, Any]) -> None:
    """Where an average stands in the place of the weights, give the checkpoint the reference that has moved.

    It is no part of the average, and among `current_model_state` alone nobody would look for it.
    """
    current = checkpoint.get("current_model_state", {})
    checkpoint["state_dict"] |= {name: weight for name, weight in current.items() if name.startswith("reference.")}


def _names(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))

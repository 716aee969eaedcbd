"""One run of an experiment, through the module and the Trainer that users have, and what is kept of it."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from grpo_lightning import GRPOModule
from grpo_lightning.data import PromptDataModule
from grpo_lightning.types import Stream

Curves = dict[str, list[float]]
"""Of each quantity a value per update (``held_out``: per evaluation, and ``evaluated``: after how many updates)."""
Measure = Callable[[GRPOModule], Mapping[str, float]]
"""Reads the rollout and the rewards of an iteration that has just made its first update."""


class Recorder(Callback):
    """Keeps some of what an iteration's first and last updates log, and evaluates now and then.

    Args:
        metrics: Names of metrics that the first update logs.
        last_metrics: Names of metrics that the last update logs: those of the ratio, which is 1 on the first.
        measure: Computes others.
        evaluate_every: Updates between two evaluations of the validation prompts; 0 for none.
    """

    def __init__(
        self, metrics: Sequence[str], last_metrics: Sequence[str], measure: Measure, evaluate_every: int
    ) -> None:
        self.metrics, self.last_metrics = metrics, last_metrics
        self.measure, self.evaluate_every = measure, evaluate_every
        self.curves: Curves = {}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Evaluate the policy that the run begins with."""
        self._evaluate(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Keep what is wanted, in the order of the updates."""
        if batch.starts_iteration:
            self._keep({"update": trainer.global_step, **self.measure(pl_module)})
            self._keep({name: float(trainer.callback_metrics[name]) for name in self.metrics})
        if batch.ends_iteration:
            self._keep({name: float(trainer.callback_metrics[name]) for name in self.last_metrics})
        self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: Trainer, pl_module: Any) -> None:
        if self.evaluate_every and trainer.global_step % self.evaluate_every == 0:
            loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
            found = pl_module.evaluate(loader, stream=Stream.VALIDATION)
            self._keep({"evaluated": trainer.global_step, "held_out": found["reward/mean"]})

    def _keep(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.curves.setdefault(name, []).append(round(float(value), 5))


def nothing(module: GRPOModule) -> Mapping[str, float]:  # noqa: ARG001 - a `Measure`
    """The measure of an experiment that logged metrics are enough for."""
    return {}


def train(
    module: GRPOModule,
    data: PromptDataModule,
    reward: Callback,
    *,
    num_updates: int,
    metrics: Sequence[str] = (),
    last_metrics: Sequence[str] = (),
    measure: Measure = nothing,
    evaluate_every: int = 0,
    gradient_clip_val: float | None = 1.0,
) -> Curves:
    """Train for so many optimizer steps on the CPU, and say what happened on the way.

    Args:
        module: With all that the arms of an experiment differ in.
        data: Its problems.
        reward: What is rewarded.
        num_updates: Optimizer steps.
        metrics: See `Recorder`.
        last_metrics: See `Recorder`.
        measure: See `Recorder`.
        evaluate_every: See `Recorder`.
        gradient_clip_val: Of the Trainer.
    """
    recorder = Recorder(metrics, last_metrics, measure, evaluate_every)
    trainer = quiet_trainer(num_updates, [reward, recorder], gradient_clip_val)
    with without_advice():
        trainer.fit(module, data)
    return recorder.curves


def quiet_trainer(num_updates: int, callbacks: list[Callback], gradient_clip_val: float | None = 1.0) -> Trainer:
    """A Trainer that leaves nothing behind."""
    return Trainer(
        accelerator="cpu",
        max_steps=num_updates,
        max_epochs=-1,
        gradient_clip_val=gradient_clip_val,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )


@contextmanager
def without_advice() -> Iterator[None]:
    """Lightning says of every run which accelerators there are, and that its loaders have few workers."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

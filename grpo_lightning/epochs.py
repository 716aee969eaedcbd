"""What the Trainer takes for an epoch: how many micro-batches, and of which prompts."""

from collections.abc import Sequence
from typing import Any

from grpo_lightning.batching import IterationShape
from grpo_lightning.ticks import TickLoader
from grpo_lightning.types import Prompt


def epoch_of(trainer: Any, shape: IterationShape, prompts: Sequence[Prompt]) -> TickLoader:
    """The ticks of as many iterations as go once through the prompts."""
    return TickLoader(
        num_iterations=-(-len(prompts) // shape.prompts_per_iteration),
        num_updates=shape.num_updates,
        num_microbatches=trainer.accumulate_grad_batches,
        limit=trainer.limit_train_batches,
    )


def overfitted(trainer: Any, loader: TickLoader, shape: IterationShape, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """The prompts of the run: where few batches are to be overfitted, as many as an epoch has, the first ones."""
    num_iterations = loader.num_taken // loader.ticks_per_iteration
    return prompts[: num_iterations * shape.prompts_per_iteration] if trainer.overfit_batches else prompts

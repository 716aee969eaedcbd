"""Controller: a reference that is replaced by the policy now and then."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from grpo_lightning.controllers import Controlled, Controller, check_movable_reference
from grpo_lightning.types import ConfigurationError


class ReferenceRefresh(Controller):
    r"""Sets :math:`\pi_{ref} \leftarrow \pi_\theta` every n optimizer steps, or every n iterations.

    DeepSeek-R1-Zero does so every 400 steps (https://arxiv.org/abs/2501.12948); Algorithm 1 of DeepSeekMath does so at
    the start of each of its outer iterations (https://arxiv.org/abs/2402.03300). The completions of the iteration
    under way keep the log-probabilities of the reference that they began with.

    Args:
        every_n_steps: Optimizer steps between two refreshes, >= 1, counted from the start of the run.
        every_n_iterations: Iterations between two refreshes, >= 1. Exactly one of the two is given.

    Raises:
        ConfigurationError: Both are given, or none, or less than 1; or there is no reference that can be moved.
    """

    def __init__(self, every_n_steps: int | None = None, every_n_iterations: int | None = None) -> None:
        super().__init__()
        if (every_n_steps is None) == (every_n_iterations is None):
            raise ConfigurationError(
                "ReferenceRefresh: give one of every_n_steps and every_n_iterations, "
                f"got {every_n_steps} and {every_n_iterations}."
            )
        for name, value in (("every_n_steps", every_n_steps), ("every_n_iterations", every_n_iterations)):
            if value is not None and value < 1:
                raise ConfigurationError(f"ReferenceRefresh.{name} must be >= 1, got {value}.")
        self.every_n_steps = every_n_steps
        self.every_n_iterations = every_n_iterations

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        """Refuse a run without a reference of its own."""
        if stage == "fit":
            check_movable_reference(pl_module, type(self).__name__)

    def on_update_end(self, trainer: Trainer, module: Controlled, metrics: Mapping[str, float]) -> None:  # noqa: ARG002
        """Refresh where it is time."""
        num_steps = trainer.global_step + 1
        if self.every_n_iterations is not None:
            is_due = num_steps % (module.num_updates * self.every_n_iterations) == 0
        else:
            assert self.every_n_steps is not None, "one of the two is given"
            is_due = num_steps % self.every_n_steps == 0
        if is_due:
            module.move_reference(1.0)

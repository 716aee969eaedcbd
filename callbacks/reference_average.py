"""Controller: a reference that is a moving average of the policy."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from grpo_lightning.controllers import Controlled, Controller, check_movable_reference
from grpo_lightning.types import ConfigurationError


class ReferenceAverage(Controller):
    r"""Sets :math:`\pi_{ref} \leftarrow \alpha\,\pi_\theta + (1 - \alpha)\,\pi_{ref}`, weight by weight, every n steps.

    The soft update of TR-DPO (Learn Your Reference Model, equation 8, https://arxiv.org/abs/2404.09656). The
    completions of the iteration under way keep the log-probabilities of the reference that they began with.

    Args:
        share: alpha, in (0, 1]. A reference in half precision cannot follow in small steps: what a step changes must
            be more than a weight's rounding.
        every_n_steps: Optimizer steps between two updates of the reference, >= 1.

    Raises:
        ConfigurationError: An argument is out of its range, or there is no reference that can be moved.
    """

    def __init__(self, share: float = 0.6, every_n_steps: int = 512) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise ConfigurationError(f"ReferenceAverage.share must be in (0, 1], got {share}.")
        if every_n_steps < 1:
            raise ConfigurationError(f"ReferenceAverage.every_n_steps must be >= 1, got {every_n_steps}.")
        self.share = share
        self.every_n_steps = every_n_steps

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        """Refuse a run without a reference of its own."""
        if stage == "fit":
            check_movable_reference(pl_module, type(self).__name__)

    def on_update_end(self, trainer: Trainer, module: Controlled, metrics: Mapping[str, float]) -> None:  # noqa: ARG002
        """Move the reference where it is time."""
        if (trainer.global_step + 1) % self.every_n_steps == 0:
            module.move_reference(self.share)

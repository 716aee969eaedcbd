"""Observer: how large the gradient is."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer


class GradientNorm(Callback):
    r"""Logs ``policy/gradient_norm``, the length of an update's whole gradient before it is clipped.

    .. math::
        \lVert g \rVert_2 = \sqrt{\textstyle\sum_j g_j^2}

    over all trained weights, after the accumulation and the average over ranks. That of sharded weights is the same.
    """

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:  # noqa: ARG002
        """Log it; Lightning clips afterwards."""
        parameters = [p for p in pl_module.policy.parameters() if p.requires_grad]
        pl_module.log("policy/gradient_norm", pl_module.placement.gradient_norm(parameters))

"""Observer: how large the gradient is."""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer


class GradientNorm(Callback):
    r"""Logs ``policy/gradient_norm``, the length of an update's whole gradient before it is clipped.

    .. math::
        \lVert g \rVert_2 = \sqrt{\textstyle\sum_j g_j^2}

    over all trained weights, after the accumulation and the average over ranks. Weights must not be sharded.
    """

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:  # noqa: ARG002
        """Log it; Lightning clips afterwards."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        pl_module.log("policy/gradient_norm", norms.double().norm())

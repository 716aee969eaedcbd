"""Controller: a KL coefficient that keeps the policy at a chosen distance from its reference."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from grpo_lightning.controllers import Controlled, Controller
from grpo_lightning.types import ConfigurationError


class AdaptiveKL(Controller):
    r"""Moves the KL coefficient after every update, in proportion to how far the divergence is from its target.

    .. math::
        e = \operatorname{clip}\!\left(\frac{D - D^*}{D^*}, -c, c\right), \qquad \beta \leftarrow \beta\,(1 + K e)

    D is what the update logs as `policy/kl`: the objective's estimate, the mean over the loss tokens (in the paper the
    sum over a completion's). Source: Ziegler et al. 2019, section 2.2 (https://arxiv.org/abs/1909.08593).

    Args:
        target: D*, in nats per token, > 0.
        gain: K, > 0.
        clip: c, > 0: the largest relative error that counts. gain * clip must be < 1: the coefficient stays positive.

    Raises:
        ConfigurationError: An argument is out of its range, or the objective has no reference.
    """

    def __init__(self, target: float, gain: float = 0.1, clip: float = 0.2) -> None:
        super().__init__()
        for name, value in (("target", target), ("gain", gain), ("clip", clip)):
            if not value > 0:
                raise ConfigurationError(f"AdaptiveKL.{name} must be > 0, got {value}.")
        if not gain * clip < 1:
            raise ConfigurationError(f"AdaptiveKL.gain x AdaptiveKL.clip must be < 1, got {gain} x {clip}.")
        self.target = target
        self.gain = gain
        self.clip = clip

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        """Refuse a run without a reference."""
        if stage == "fit" and not pl_module.objective.needs_reference:
            raise ConfigurationError(
                "trainer.callbacks: AdaptiveKL needs a reference model, which there is only with a "
                "model.objective.kl whose coefficient is > 0, where the adaptation begins."
            )

    def on_update_end(self, trainer: Trainer, module: Controlled, metrics: Mapping[str, float]) -> None:  # noqa: ARG002
        """Move the coefficient. An update without tokens says nothing of the divergence."""
        if "policy/kl" in metrics:
            error = metrics["policy/kl"] / self.target - 1
            factor = 1 + self.gain * min(max(error, -self.clip), self.clip)
            module.coefficients = module.coefficients._replace(kl=module.coefficients.kl * factor)

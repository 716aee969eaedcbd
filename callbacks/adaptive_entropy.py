"""Controller: an entropy bonus that is paid while the entropy is below its target."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from grpo_lightning.controllers import Controlled, Controller
from grpo_lightning.types import ConfigurationError


class AdaptiveEntropy(Controller):
    r"""Moves the entropy coefficient after every update.

    .. math::
        c \leftarrow \begin{cases} c + \Delta & H \le H^* \\ c - \Delta & H > H^* \end{cases}, \qquad
        \alpha = c\,\mathbf 1[H \le H^*]

    H is the entropy that the update logs as `policy/entropy`, the mean over the loss tokens, and alpha is what the
    next update is paid. c begins with `model.objective.entropy.coefficient` and stays in [0, `maximum`]. Source:
    Skywork Open Reasoner 1 (https://arxiv.org/abs/2505.22312).

    Args:
        target: H*, in nats per token, > 0.
        step: Delta, > 0.
        maximum: Largest c, > 0.

    Raises:
        ConfigurationError: An argument is out of its range, or the objective has no entropy bonus.
    """

    def __init__(self, target: float = 0.2, step: float = 0.005, maximum: float = 1.0) -> None:
        super().__init__()
        for name, value in (("target", target), ("step", step), ("maximum", maximum)):
            if not value > 0:
                raise ConfigurationError(f"AdaptiveEntropy.{name} must be > 0, got {value}.")
        self.target = target
        self.step = step
        self.maximum = maximum
        self._strength: float | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        """Refuse a run without a bonus."""
        if stage == "fit" and pl_module.objective.entropy is None:
            raise ConfigurationError(
                "trainer.callbacks: AdaptiveEntropy needs a bonus to begin with, got model.objective.entropy: null.\n"
                "Set model.objective.entropy.coefficient, also to 0."
            )

    def state_dict(self) -> dict[str, Any]:
        """c, which is not paid while the entropy is above its target; None before the first update."""
        return {"strength": self._strength}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the saved c."""
        self._strength = state_dict["strength"]

    def on_update_end(self, trainer: Trainer, module: Controlled, metrics: Mapping[str, float]) -> None:  # noqa: ARG002
        """Move the coefficient. An update without tokens says nothing of the entropy."""
        if "policy/entropy" not in metrics:
            return
        is_low = metrics["policy/entropy"] <= self.target
        strength = module.coefficients.entropy if self._strength is None else self._strength
        self._strength = min(max(strength + (self.step if is_low else -self.step), 0.0), self.maximum)
        module.coefficients = module.coefficients._replace(entropy=self._strength if is_low else 0.0)

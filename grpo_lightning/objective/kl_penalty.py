"""The penalty that holds the policy near its reference."""

from dataclasses import dataclass

from grpo_lightning.types import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class KLPenalty:
    """beta * KL(pi_theta || pi_ref) in the loss, by the k3 estimator (DeepSeekMath, equations 3 and 4).

    Args:
        coefficient: beta, >= 0; 0 leaves the reference model out altogether.
    """

    coefficient: float

    def __post_init__(self) -> None:
        if not self.coefficient >= 0:
            raise ConfigurationError(f"model.objective.kl.coefficient must be >= 0, got {self.coefficient}.")

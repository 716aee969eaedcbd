"""The numbers that an iteration is cut by."""

from dataclasses import asdict, dataclass

from grpo_lightning.types import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class IterationShape:
    """How many prompts and completions an iteration has, and how many updates learn from them.

    Args:
        prompts_per_iteration: Over all ranks, >= 1.
        group_size: G, completions per prompt, >= 2.
        num_epochs: The paper's mu, >= 1: how often an iteration's completions are learned from.
        num_minibatches: Updates per epoch, >= 1; each learns from an equal share of the prompts.

    Raises:
        ConfigurationError: A number is too small.
    """

    prompts_per_iteration: int
    group_size: int
    num_epochs: int
    num_minibatches: int

    def __post_init__(self) -> None:
        for name, least in (("prompts_per_iteration", 1), ("num_epochs", 1), ("num_minibatches", 1), ("group_size", 2)):
            if getattr(self, name) < least:
                raise ConfigurationError(f"model.{name} must be >= {least}, got {getattr(self, name)}.")

    @property
    def num_updates(self) -> int:
        """Optimizer steps of an iteration."""
        return self.num_epochs * self.num_minibatches

    @property
    def prompts_per_minibatch(self) -> int:
        """Over all ranks."""
        return self.prompts_per_iteration // self.num_minibatches

    @property
    def settings(self) -> dict[str, int]:
        """Each number by its YAML key."""
        return {f"model.{name}": value for name, value in asdict(self).items()}

"""Controllers: callbacks that change the run between two updates, at the one moment that a checkpoint stands at."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from typing import Any, Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from grpo_lightning.groups import GroupOutcome
from grpo_lightning.types import Coefficients, ConfigurationError


class Retirable(Protocol):
    """Where the training prompts come from."""

    def num_others(self, than: Set[int]) -> int:
        """How many prompts are neither retired nor have an index among `than`."""

    def retire(self, index: int) -> None:
        """Never draw the prompt of this index again."""


class Shape(Protocol):
    """The numbers of an iteration."""

    @property
    def prompts_per_iteration(self) -> int:
        """Over all ranks."""


class Regularisation(Protocol):
    """What of the objective a controller asks for."""

    @property
    def entropy(self) -> object | None:
        """None for no bonus."""

    @property
    def needs_reference(self) -> bool:
        """Whether there is a reference."""


class Controlled(Protocol):
    """What of the module a controller reads and changes."""

    iteration: int
    """The next one, where the update was the last of its iteration."""
    num_updates: int
    """Optimizer steps of an iteration."""
    coefficients: Coefficients
    outcomes: Sequence[GroupOutcome]
    """Of the groups drawn since the last update, over all ranks and so the same on every rank."""

    @property
    def objective(self) -> Regularisation:
        """What is maximised."""

    @property
    def prompts(self) -> Retirable:
        """Where the training prompts come from."""

    @property
    def shape(self) -> Shape:
        """The numbers of an iteration."""

    def move_reference(self, share: float) -> None:
        """pi_ref <- share pi_theta + (1 - share) pi_ref."""


class Controller(Callback, ABC):
    """A callback that is called after every update, before anything can be saved.

    What it changes of the module is in the checkpoint, and so is its own `state_dict`: change neither in another hook.
    A save inside the next accumulation window is rewound to this moment.
    """

    @abstractmethod
    def on_update_end(self, trainer: Trainer, module: Controlled, metrics: Mapping[str, float]) -> None:
        """The optimizer has stepped, or has left out an update without a token.

        Args:
            trainer: Its `global_step` does not count this update yet.
            module: The run.
            metrics: Of this update, over all ranks and so the same on every rank: `policy/kl`, `policy/entropy` ...
                An update without tokens has none of these.
        """


def check_movable_reference(module: Any, controller: str) -> None:
    """The run has a reference with weights of its own.

    Args:
        module: The run's, before its policy is loaded.
        controller: The class that moves the reference.

    Raises:
        ConfigurationError: It has none, or it is the policy without its adapter.
    """
    if not module.objective.needs_reference:
        raise ConfigurationError(
            f"trainer.callbacks: {controller} needs a reference model, which there is only with a model.objective.kl "
            "whose coefficient is > 0."
        )
    if getattr(module, "lora", None) is not None:
        raise ConfigurationError(
            f"trainer.callbacks: {controller} cannot move the reference under model.lora: it is the policy without its "
            "adapter."
        )


def tell_controllers(trainer: Trainer, module: Controlled, metrics: Mapping[str, float]) -> None:
    """Call the controllers among the Trainer's callbacks, in their order."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Controller):
            callback.on_update_end(trainer, module, metrics)

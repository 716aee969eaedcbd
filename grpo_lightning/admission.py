"""What is looked at before a run: a mistake that can be known then is told before anything on disk is touched."""

from abc import ABC, abstractmethod
from typing import Any, Protocol, TypeGuard, runtime_checkable

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from transformers import PreTrainedTokenizerBase

from grpo_lightning.data import PromptDataModule, PromptStream
from grpo_lightning.epochs import epoch_of
from grpo_lightning.evaluation import Evaluation
from grpo_lightning.models import check_compile, check_policy
from grpo_lightning.policy import Compile, LoRA, PolicyRecipe, PolicySource
from grpo_lightning.preconditions import check_alignment, check_trainer
from grpo_lightning.rewards import RewardCallback, find_rewards
from grpo_lightning.rollouts import RolloutsOfARun
from grpo_lightning.stock_callbacks import check_callbacks
from grpo_lightning.strategies import placement_kind
from grpo_lightning.strategies.communication import check_communication
from grpo_lightning.strategies.gathering import check_gathering


@runtime_checkable
class CheckedBeforehand(Protocol):
    """A module whose runs are looked at before they begin, on each rank by itself: nothing of it is a collective."""

    def check_settings(self, trainer: Trainer) -> None:
        """Look at what needs neither the policy nor the data.

        Args:
            trainer: Which has run nothing yet.

        Raises:
            ConfigurationError: There is a mistake.
        """

    def check_inputs(self, trainer: Trainer, datamodule: LightningDataModule | None) -> None:
        """Look at the policy, without its weights, and at the data.

        Args:
            trainer: Which has run nothing yet.
            datamodule: Of the run.

        Raises:
            ConfigurationError: There is a mistake.
        """


class CheckedSettings(RolloutsOfARun, ABC):
    """Looks at the settings of a GRPO run."""

    source: PolicySource
    lora: LoRA | None
    gradient_checkpointing: bool
    compilation: Compile | None
    max_tokens_per_microbatch: int | None
    evaluation: Evaluation

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's."""

    @property
    def recipe(self) -> PolicyRecipe:
        """What the policy is made of."""
        settings: Any = {"lora": self.lora, "gradient_checkpointing": self.gradient_checkpointing, "seed": self.seed}
        return PolicyRecipe(source=self.source, tokenizer=self.tokenizer, compile=self.compilation, **settings)

    def check_parts(self, trainer: Trainer) -> list[RewardCallback]:
        """Look at how the Trainer's parts and the module's fit together, for training or not.

        Returns:
            The rewards.

        Raises:
            ConfigurationError: They do not.
        """
        rewards = find_rewards(trainer.callbacks)  # type: ignore[attr-defined]
        self.evaluation.check_rewards([reward.name for reward in rewards])
        kind = placement_kind(trainer.strategy)
        check_gathering(self.engine.gather, kind)
        has_copy, max_tokens = self.engine.has_copy, self.max_tokens_per_microbatch
        kind.check_settings(engine_has_copy=has_copy, max_tokens_per_microbatch=max_tokens)
        return rewards

    def check_settings(self, trainer: Trainer) -> None:
        """See `CheckedBeforehand`."""
        check_callbacks(trainer)
        check_communication(trainer.strategy)
        self.check_parts(trainer)
        check_trainer(trainer, self.shape)
        check_compile(self.compilation, trainer.strategy)

    def check_inputs(self, trainer: Trainer, datamodule: LightningDataModule | None) -> None:
        """See `CheckedBeforehand`. What a policy's positions can hold is looked at when a prompt is drawn."""
        recipe = self.recipe
        if is_readable(datamodule):
            datamodule.encode(self.tokenizer)
            PromptStream(datamodule.training_prompts, seed=self.seed)
            check_alignment(trainer, epoch_of(trainer, self.shape, datamodule.training_prompts))
        check_policy(recipe, trainer.strategy)


def is_readable(datamodule: LightningDataModule | None) -> TypeGuard[PromptDataModule]:
    """Whether data can be read at once: others may have to be prepared first, once per machine, or set up."""
    if not isinstance(datamodule, PromptDataModule) or is_overridden("prepare_data", datamodule):
        return False
    return not is_overridden("setup", datamodule, PromptDataModule)

"""The policy of a run, as its settings want it trained: with its weights on every rank, or on the first alone."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_lightning.policy.adaptation import weights_checksum
from grpo_lightning.policy.blueprint import Blueprint
from grpo_lightning.policy.compilation import Compile
from grpo_lightning.policy.lora import LoRA
from grpo_lightning.policy.policy import Policy
from grpo_lightning.policy.source import PolicySource
from grpo_lightning.types import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class PolicyRecipe:
    """What a policy is made of."""

    source: PolicySource
    tokenizer: PreTrainedTokenizerBase
    """The source's."""
    seed: int
    """Of whatever weights are random."""
    lora: LoRA | None = None
    """What is trained; None for all weights."""
    gradient_checkpointing: bool = False
    """See `recompute_layers`."""
    has_reference: bool = False
    """Whether a copy of it, as it is loaded, is a reference that checkpoints do not have."""
    compile: Compile | None = None
    """Of the blocks, once the weights are in place."""

    def whole(self) -> Policy:
        """The policy with its weights.

        Raises:
            ConfigurationError: The model cannot be loaded, or does not fit the settings.
        """
        model = self.source.load_model(seed=self.seed)
        base_checksum = weights_checksum(model) if self.has_reference and self.lora is None else None
        if self.lora is not None:
            base_checksum = self.lora.adapt(model, seed=self.seed)
        if self.gradient_checkpointing:
            recompute_layers(model)
        return Policy(model, self.tokenizer, base_checksum=base_checksum)

    def check(self) -> PreTrainedModel | None:
        """Look at the policy before its weights are read.

        Returns:
            What is to be trained, on the meta device; None of a source that makes no skeleton of its own: that of
            `PolicySource` may need weights.

        Raises:
            ConfigurationError: There is no such model, or it does not fit the settings.
        """
        if type(self.source).load_skeleton is PolicySource.load_skeleton:
            return None
        with torch.random.fork_rng(devices=[]):
            model = self.source.load_skeleton()
            if self.lora is not None:
                self.lora.adapt_skeleton(model)
        if self.gradient_checkpointing:
            recompute_layers(model)
        return model

    def without_weights(self, blueprint: Blueprint) -> Policy:
        """The same with its weights on the meta device.

        Args:
            blueprint: Of the whole.

        Raises:
            ConfigurationError: The source's skeleton is of another model.
        """
        model = self.source.load_skeleton()
        if self.lora is not None:
            self.lora.adapt_skeleton(model)
        blueprint.complete(model)
        if self.gradient_checkpointing:
            recompute_layers(model)
        return Policy(model, self.tokenizer, base_checksum=blueprint.base_checksum, traits=blueprint.traits)

    def compile_blocks(self, blocks: Iterable[nn.Module]) -> None:
        """Have the blocks of a model compiled, where that is asked for."""
        if self.compile is not None:
            self.compile.compile(blocks)


def load_on_first_rank(recipe: PolicyRecipe, *, is_first: bool, broadcast: Callable[[Any], Any]) -> Policy:
    """Load a policy on one rank, in its CPU's memory, and build it without weights on the others. A collective.

    Args:
        recipe: The same on every rank.
        is_first: Whether this rank is the one.
        broadcast: Sends an object from there to all ranks.

    Raises:
        ConfigurationError: On every rank, what the first one could not load or any of them not build.
    """
    policy: Policy | None = None
    found: Blueprint | ConfigurationError | None = None
    if is_first:
        try:
            with torch.device("cpu"):
                policy = recipe.whole()
            found = Blueprint.of(policy)
        except ConfigurationError as error:
            found = error
    found = broadcast(found)
    if isinstance(found, ConfigurationError):
        raise found
    return policy or recipe.without_weights(found)


def recompute_layers(model: PreTrainedModel) -> None:
    """Have the backward pass compute each layer again, so that the activations of one alone are in memory.

    Rollouts, which need no gradient, are as before. Source: Chen et al. (https://arxiv.org/abs/1604.06174).

    Raises:
        ConfigurationError: The model cannot.
    """
    # Older versions have the old name alone, newer ones warn of it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False, "preserve_rng_state": False})  # there is no dropout
    except ValueError as error:
        raise ConfigurationError(f"model.gradient_checkpointing: the policy cannot: {error}") from error
    model.disable_input_require_grads()  # for reentrant checkpoints, which these are not

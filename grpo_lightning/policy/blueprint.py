"""What the first rank tells the others of a policy, for them to build the same one without its weights."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_lightning.policy.policy import Policy
from grpo_lightning.policy.traits import Traits
from grpo_lightning.types import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """A policy but for its weights; small, and sent as it is."""

    traits: Traits
    base_checksum: int | None
    generation_config: Any
    name_or_path: str
    weights: dict[str, tuple[torch.Size, torch.dtype, bool]]
    """Shape, precision, and whether it is trained, by name."""
    others: dict[str, Tensor]
    """See `other_tensors`."""

    @classmethod
    def of(cls, policy: Policy) -> "Blueprint":
        """That of a policy with its weights."""
        model = policy.model
        return cls(
            traits=policy.traits,
            base_checksum=policy.base_checksum,
            generation_config=model.generation_config,
            name_or_path=model.name_or_path,
            weights={name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()},
            others=other_tensors(model),
        )

    def complete(self, model: PreTrainedModel) -> None:
        """Make a skeleton agree with the model, in place, but for its weights.

        Args:
            model: What `PolicySource.load_skeleton` gives, with an adapter where the policy has one.

        Raises:
            ConfigurationError: It has other weights.
        """
        shapes = {(name, parameter.shape) for name, parameter in model.named_parameters()}
        differences = shapes ^ {(name, shape) for name, (shape, _, _) in self.weights.items()}
        if differences:
            raise ConfigurationError(
                f"model.policy: load_skeleton gives a model with other weights than load_model, "
                f"{min(differences)[0]} among them; a strategy that cuts weights needs both to agree."
            )
        for name, parameter in model.named_parameters():
            _, dtype, is_trained = self.weights[name]
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(is_trained)
        copy_other_tensors(self.others, model)
        model.generation_config = self.generation_config
        model.name_or_path = self.name_or_path


def other_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a model keeps besides its parameters, saved or not: buffers, as of rotations, and tensors beside them."""
    tensors = {}
    for path, module in model.named_modules():
        for name, value in (*module._buffers.items(), *vars(module).items()):
            if isinstance(value, Tensor):
                tensors[f"{path}.{name}".removeprefix(".")] = value
    return tensors


def copy_other_tensors(tensors: dict[str, Tensor], model: nn.Module) -> None:
    """Give such tensors to a model that was made on the meta device; each of its modules has its own."""
    for name in list(other_tensors(model)):
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, tensors[name].detach().clone())

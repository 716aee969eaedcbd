"""Weights taken out of a model and put into one, which stays as it is in everything else."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def put_in(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Make parameters of some tensors, in place of those that a model has under these names.

    What is tied stays tied, and what is frozen stays frozen.
    """
    new = {
        id(parameter): nn.Parameter(weights[name], requires_grad=parameter.requires_grad)
        for name, parameter in model.named_parameters()
        if name in weights
    }
    for module in model.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = new.get(id(parameter), parameter)


def take_out(model: nn.Module) -> dict[str, Tensor]:
    """Leave a model on the meta device, but for its buffers.

    Returns:
        Its weights by name.
    """
    weights = {name: parameter.data for name, parameter in model.named_parameters()}
    put_in(model, {name: torch.empty_like(weight, device="meta") for name, weight in weights.items()})
    return weights

"""A model with low-rank additions: which layers have them, what they come to, and the model without them."""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_lightning.functional.checksums import checksum

NAME = "default"
"""PEFT's name of the only adapter of a model."""


def is_adapted(model: nn.Module) -> bool:
    """Whether a model has an adapter."""
    return hasattr(model, "peft_config")


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that something is added to, by name."""
    if not is_adapted(model):
        return {}
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}


@torch.no_grad()
def merged_weight(layer: Any, whole: Callable[[Tensor], Tensor] = torch.Tensor.detach) -> Tensor:
    r"""The weight of an adapted layer with its addition, :math:`W + \frac{\alpha}{r} B A`, in the precision of W.

    Args:
        layer: Of `adapted_layers`.
        whole: Puts a weight together that is sharded.
    """
    weight, a, b = map(whole, (layer.base_layer.weight, layer.lora_A[NAME].weight, layer.lora_B[NAME].weight))
    addition = (b @ a) * layer.scaling[NAME]
    # GPT-2's layers hold the transpose.
    merged: Tensor = weight + (addition.T if layer.fan_in_fan_out else addition)
    return merged.to(weight.dtype)


def merge(model: PreTrainedModel) -> None:
    """Put the additions into the weights, in place: what is left is the plain model of the same class."""
    for name, layer in adapted_layers(model).items():
        layer.base_layer.weight.data = merged_weight(layer)
        model.set_submodule(name, layer.base_layer)
    del model.peft_config
    model.requires_grad_(True)


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Inside, the model is what it is without the additions. Which weights are trained stays as it is."""
    layers = adapted_layers(model).values()
    for layer in layers:
        layer._disable_adapters = True  # PEFT's own switch makes its weights untrainable too
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def weights_checksum(model: nn.Module) -> int:
    """A number that tells the weights of two models of the same precision apart, by name and bits."""
    number = 0
    for name, parameter in model.named_parameters():
        number = zlib.crc32(f"{name}:{checksum(parameter)}".encode(), number)
    return number

"""Adapters that change something: a new one is no change, since its B is 0."""

import torch

from grpo_lightning.policy import LoRA, adapter_weights


def adapted(model, *, std=0.3, **settings):
    """The model with A and B at random. Returns the model's checksum too."""
    checksum = LoRA(**{"rank": 3, **settings}).adapt(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in adapter_weights(model).values():
            weight.copy_(std * torch.randn(weight.shape, generator=generator))
    return model, checksum

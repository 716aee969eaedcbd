"""Models that are double precision throughout."""

from types import MethodType

import torch


def in_double(model):
    """The model in fp64, its norms too: transformers takes those in fp32 whatever the model's precision.

    A sum of gradients that is rounded there afterwards differs from one of rounded gradients, by 1e-8.
    """
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_gemma if "Gemma" in type(module).__name__ else _plain, module)
    return model.double()


def _normalized(module, hidden):
    epsilon = module.eps if hasattr(module, "eps") else module.variance_epsilon
    return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + epsilon)


def _plain(module, hidden):
    return module.weight * _normalized(module, hidden)


def _gemma(module, hidden):
    return (1 + module.weight) * _normalized(module, hidden)

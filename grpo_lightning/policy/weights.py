"""The policy's weights, one full tensor after the other."""

from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grpo_lightning.policy.adaptation import adapted_layers, merged_weight

_BASE = ".base_layer."
"""Between the name of an adapted layer and those of its own weights."""


class NamedWeights:
    """The weights of a model as they are whenever they are iterated over; tied ones once, under their first name.

    A sharded tensor is put together when its turn comes and let go before the next: there is never a second copy of the
    whole. Every rank must iterate, and as far as the others. Under an adapter they are those of the plain model, each
    with what the adapter adds to it at the moment.

    Example::

        for name, tensor in NamedWeights(model): ...   # "model.embed_tokens.weight", ...
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Names as in the model's checkpoint, detached tensors."""
        layers = adapted_layers(self._model)
        additions = {id(parameter) for layer in layers.values() for parameter in _additions(layer)}
        for name, parameter in self._model.named_parameters():
            if name.endswith(f"{_BASE}weight"):
                layer = name.removesuffix(f"{_BASE}weight")
                yield f"{layer}.weight", merged_weight(layers[layer], _whole)
            elif id(parameter) not in additions:
                yield name.replace(_BASE, "."), _whole(parameter)


def _additions(layer: nn.Module) -> Iterator[nn.Parameter]:
    """The weights of an adapted layer that are not the model's own."""
    yield from (parameter for name, parameter in layer.named_parameters() if not f".{name}".startswith(_BASE))


def _whole(tensor: Tensor) -> Tensor:
    """A weight as it is, or put together from the shards of FSDP2 or of ZeRO."""
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

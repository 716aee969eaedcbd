"""The policy's weights, one full tensor after the other."""

from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class NamedWeights:
    """The weights of a model as they are whenever they are iterated over; tied ones once, under their first name.

    A sharded tensor is put together when its turn comes and let go before the next: there is never a second copy of the
    whole. Every rank must iterate, and as far as the others.

    Example::

        for name, tensor in NamedWeights(model): ...   # "model.embed_tokens.weight", ...
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Names as in the model's checkpoint, detached tensors."""
        for name, parameter in self._model.named_parameters():
            tensor = parameter.detach()
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

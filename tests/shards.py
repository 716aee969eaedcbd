"""Tensors of which this rank may hold a shard."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def whole(tensor: Tensor) -> Tensor:
    """All of it. A collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of it, or all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

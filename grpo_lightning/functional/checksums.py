"""Checksums of tensors, to tell whether a copy has exactly the bits of the original."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_COLUMNS = 1 << 10


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    r"""A sum over the bits of a tensor, after Fletcher (IEEE Transactions on Communications 30(1), 1982).

    .. math::
        a = \sum_i x_i, \qquad b = \sum_i (2i + 1)\, x_i, \qquad a + 2^{32} b \pmod{2^{64}}

    where x_i is the i-th element read as an integer. Of elements of at most 32 bits, any single change of one changes
    the low half of a; the exchange of two different ones leaves a, and changes b unless their distance times their
    difference is a multiple of 2**31. The type and the shape take no part.

    Args:
        tensor: Of any shape; real, and on any device, which it is summed on.

    Returns:
        In [-2**63, 2**63).
    """
    values_N = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()]).flatten()
    whole = len(values_N) // _COLUMNS * _COLUMNS
    # i = r * C + c: the sums of rows and of columns have all that b needs, and take no copy in 64 bits.
    rows_RC, rest_N = values_N[:whole].view(-1, _COLUMNS), values_N[whole:].long()
    sums_R, sums_C = rows_RC.sum(1, dtype=torch.int64), rows_RC.sum(0, dtype=torch.int64)
    r_R, c_C = (torch.arange(len(sums), device=tensor.device) for sums in (sums_R, sums_C))
    i_N = torch.arange(whole, len(values_N), device=tensor.device)
    a = sums_C.sum() + rest_N.sum()
    b = 2 * _COLUMNS * (r_R * sums_R).sum() + ((2 * c_C + 1) * sums_C).sum() + ((2 * i_N + 1) * rest_N).sum()
    return int(a + (b << 32))


def local_share(weight: Tensor) -> Tensor:
    """What this rank has of a weight: all of it, or its shard under FSDP2 (a DTensor) or ZeRO's stage 3."""
    if hasattr(weight, "ds_tensor"):
        shard: Tensor = weight.ds_tensor
        return shard
    return weight.to_local() if isinstance(weight, DTensor) else weight

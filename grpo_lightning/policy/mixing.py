"""A reference that follows the policy."""

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def mix(reference: Iterable[Tensor], policy: Iterable[Tensor], *, share: float) -> None:
    r"""Replace each weight of the reference by :math:`\alpha\,\theta + (1 - \alpha)\,\theta_{ref}`.

    With 1 the reference is a copy of the policy, to the bit. Source: Learn Your Reference Model, equation 8
    (https://arxiv.org/abs/2404.09656).

    Args:
        reference: Its weights, or this rank's shares of them; changed in place.
        policy: Of the same architecture, and cut alike.
        share: alpha, in (0, 1].
    """
    for of_reference, of_policy in zip(reference, policy, strict=True):
        of_reference.copy_(of_policy if share == 1 else share * of_policy + (1 - share) * of_reference)

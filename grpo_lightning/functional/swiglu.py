"""The gated activation of a feed-forward layer, without its activation kept for the backward pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    r"""The product of SwiGLU.

    .. math::
        y = \mathrm{silu}(a)\, b, \qquad \mathrm{silu}(a) = a\, \sigma(a)

    Kept for the backward pass are a and b alone; silu(a) is computed again.

    Source: Shazeer, GLU Variants Improve Transformer (https://arxiv.org/abs/2002.05202), equation 6.

    Args:
        gate: a.
        up: b, of the same shape.

    Returns:
        y, of that shape.
    """
    if gate.dtype != up.dtype:
        return silu(gate) * up
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        y: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
        return y
    return silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    """With few passes over memory."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """The product."""
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of both factors."""
        gate, up = ctx.saved_tensors
        of_activation = grad * up
        of_gate = torch.ops.aten.silu_backward.grad_input(of_activation, gate, grad_input=of_activation)
        return of_gate, silu(gate).mul_(grad)

"""Root-mean-square norm that keeps its input alone for the backward pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
    r"""The norm of Llama and Qwen, to the bit of transformers' modules.

    .. math::
        y_d = w_d\, \mathrm{cast}(x_d\, r), \qquad r = \Big(\frac{1}{D} \sum_d x_d^2 + \epsilon\Big)^{-1/2}

    The mean and the product with r are in fp32, whatever x is in; cast goes back to the precision of x.

    Kept for the backward pass are x, w and r, of which x is the residual stream and there anyway. With g the gradient
    of y, and in at least fp32:

    .. math::
        \frac{\partial}{\partial x_d} = r\, g_d w_d - x_d\, \frac{r^3}{D} \sum_e g_e w_e x_e, \qquad
        \frac{\partial}{\partial w_d} = \sum g_d\, x_d\, r

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (https://arxiv.org/abs/1910.07467), equation 4.

    Args:
        x: [..., D].
        weight_D: w, the gain.
        eps: Added to the mean square, > 0.

    Returns:
        y, of x's shape, in the precision that x and w promote to.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight_D.requires_grad):
        y: Tensor = _RMSNorm.apply(x, weight_D, eps)  # type: ignore[no-untyped-call]
        return y
    return rms_norm_and_scale(x, weight_D, eps)[0]


def rms_norm_and_scale(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Of `rms_norm`: y, and r of shape [..., 1]."""
    x_fp32 = x.to(torch.float32)
    r = x_fp32.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    normed = (x_fp32 * r).to(x.dtype)
    promotes = torch.promote_types(x.dtype, weight_D.dtype) != x.dtype
    return normed * weight_D if promotes else normed.mul_(weight_D), r


class _RMSNorm(torch.autograd.Function):
    """With each pass over memory written over the last one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """The normed input."""
        y, r = rms_norm_and_scale(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input and the weight."""
        x, weight_D, r = ctx.saved_tensors
        wants_x, wants_weight, _ = ctx.needs_input_grad
        of_x = of_weight_D = None
        precision = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            x_, grad_, w_D, r_ = (tensor.to(precision) for tensor in (x, grad, weight_D, r))
            product = grad_ * x_
            product_ND, r_N = product.reshape(-1, product.shape[-1]), r_.reshape(-1)
            if wants_weight:
                of_weight_D = (r_N @ product_ND).to(weight_D.dtype)
            if wants_x:
                scale = (product_ND @ w_D).mul_(r_N.pow(3)).div_(-len(w_D)).view_as(r_)
                of_x = torch.mul(grad_, w_D, out=product).mul_(r_).addcmul_(x_, scale).to(x.dtype)
        return of_x, of_weight_D, None

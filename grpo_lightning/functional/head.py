"""Log-probabilities and entropies of given tokens, from hidden states: the whole vocabulary is never in memory."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_lightning.functional.logprobs import logprobs_and_entropy

MAX_KEPT_LOGITS = 2**23
"""Up to so many logits (32 MiB in fp32) are kept for the backward pass; more are computed again, tile by tile.

Computing them again costs a third more of the head's products, keeping them costs passes over memory: measured on a
CPU, both take the same time within a fifth for hidden sizes of 128 and 256. What is left is the overhead of small
pieces, so the limit is small: below it a batch's logits are no burden on anything.
"""


class Tile(NamedTuple):
    """How many logits are computed at once."""

    tokens: int = 512
    vocabulary: int = 4096
    """512 x 4,096 fp32 logits are 8 MiB: large enough for full-speed products, small enough for a CPU's cache."""


class Head(NamedTuple):
    r"""A language-model head: logits :math:`a = W h + b`, capped to :math:`c\tanh(a / c)` where there is a cap c.

    Source of the cap: Gemma 2 (https://arxiv.org/abs/2408.00118), section 2.
    """

    weight_VD: Tensor
    """May be tied to the embedding: its gradient adds up as everywhere."""
    bias_V: Tensor | None = None
    softcap: float | None = None

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """The logits over the whole vocabulary, [N, V]."""
        logits_NV = torch.nn.functional.linear(hidden_ND, self.weight_VD, self.bias_V)
        return logits_NV if self.softcap is None else self.softcap * torch.tanh(logits_NV / self.softcap)


def head_logprobs_and_entropy(
    hidden_ND: Tensor,
    head: Head,
    targets_N: Tensor,
    *,
    temperature: float,
    entropy_gradient: bool = False,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    r"""As `logprobs_and_entropy` of the head's logits, in memory that does not grow with the vocabulary.

    One pass over tiles of tokens and vocabulary keeps, for each token, the largest scaled logit m, the sum
    :math:`s = \sum_v e^{z_v - m}` and :math:`w = \sum_v (z_v - m)\,e^{z_v - m}`:

    .. math::
        \log\pi(y) = z_y - m - \log s, \qquad H = \log s - w / s

    The backward pass computes each tile again, for
    :math:`\partial\log\pi(y)/\partial z_v = [v = y] - \pi_v` and
    :math:`\partial H/\partial z_v = -\pi_v (\log\pi_v + H)`.

    Args:
        hidden_ND: The states that predict the targets.
        head: What makes logits of them.
        targets_N: int64, the tokens to score.
        temperature: T, > 0, the temperature that the tokens were drawn at.
        entropy_gradient: Whether gradient flows through the entropy.
        tile: Of the computation; None keeps all logits where there are few, and takes the usual tile elsewhere.

    Returns:
        The log-probabilities and the entropies in nats, each of shape N, in at least fp32.
    """
    if tile is None and len(hidden_ND) * len(head.weight_VD) <= MAX_KEPT_LOGITS:
        return logprobs_and_entropy(
            head.logits(hidden_ND), targets_N, temperature=temperature, entropy_gradient=entropy_gradient
        )
    logprobs_N, entropy_N = _TiledHead.apply(hidden_ND, *head, targets_N, temperature, tile or Tile())  # type: ignore[no-untyped-call]
    return logprobs_N, entropy_N if entropy_gradient else entropy_N.detach()


class _Logits:
    """The scaled logits of a head over the temperature, tile by tile.

    Every tile is written over the last one: fresh memory would cost more than what is computed in it.

    Args:
        hidden_ND: The states that predict the targets.
        head: What makes logits of them.
        temperature: T.
        tile: Size of a tile.
        dtype: Of the products; what is computed from them is at least fp32.
    """

    def __init__(self, hidden_ND: Tensor, head: Head, temperature: float, tile: Tile, dtype: torch.dtype) -> None:
        self.hidden_ND, self.head, self.dtype = hidden_ND.to(dtype), head, dtype
        self.temperature, self.tile = temperature, tile
        self.precision = torch.promote_types(dtype, torch.float32)
        size = min(tile.tokens, len(hidden_ND)) * min(tile.vocabulary, len(head.weight_VD))
        self._z, self._scratch = (hidden_ND.new_empty(size, dtype=self.precision) for _ in range(2))

    def columns(self) -> Iterator[tuple[slice, Head]]:
        """The vocabulary in pieces, with the head of each: outermost, so that each is read once."""
        weight_VD, bias_V, softcap = self.head
        for start in range(0, len(weight_VD), self.tile.vocabulary):
            of = slice(start, start + self.tile.vocabulary)
            yield of, Head(weight_VD[of].to(self.dtype), None if bias_V is None else bias_V[of], softcap)

    def rows(self) -> Iterator[slice]:
        """The tokens in pieces."""
        for start in range(0, len(self.hidden_ND), self.tile.tokens):
            yield slice(start, start + self.tile.tokens)

    def of(self, rows: slice, head: Head) -> Tensor:
        """z, the scaled logits of a tile; valid until the next one."""
        hidden_ND, weight_DV = self.hidden_ND[rows], head.weight_VD.T
        z_NV = self._z[: len(hidden_ND) * weight_DV.shape[1]].view(len(hidden_ND), -1)
        if self.dtype == self.precision:
            torch.mm(hidden_ND, weight_DV, out=z_NV)
        else:
            z_NV.copy_(hidden_ND @ weight_DV)
        if head.bias_V is not None:
            z_NV.add_(head.bias_V)
        if head.softcap is not None:
            z_NV.div_(head.softcap).tanh_().mul_(head.softcap)
        return z_NV if self.temperature == 1 else z_NV.div_(self.temperature)

    def like(self, z_NV: Tensor) -> Tensor:
        """Room for another tile; valid until the next one."""
        return self._scratch[: z_NV.numel()].view_as(z_NV)

    def to_products(self, z_NV: Tensor, grad_z_NV: Tensor) -> Tensor:
        """From the gradient of z, which is overwritten as z is, to that of the head's products and bias."""
        if self.temperature != 1:
            grad_z_NV.div_(self.temperature)
        if self.head.softcap is not None:
            tanh_NV = z_NV.mul_(self.temperature / self.head.softcap)
            grad_z_NV.addcmul_(grad_z_NV * tanh_NV, tanh_NV, value=-1)
        return grad_z_NV.to(self.dtype)


class _TiledHead(torch.autograd.Function):
    """The pass over the tiles, and the one that computes them again for the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        softcap: float | None,
        targets_N: Tensor,
        temperature: float,
        tile: Tile,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies."""
        device = hidden_ND.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else weight_VD.dtype
        with torch.autocast(device, enabled=False):
            logits = _Logits(hidden_ND, Head(weight_VD, bias_V, softcap), temperature, tile, dtype)
            logprobs_N, log_sum_N, entropy_N = _scan(logits, targets_N)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N, log_sum_N, entropy_N)
        ctx.settings = softcap, temperature, tile, dtype
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs_N: Tensor, grad_entropy_N: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the hidden states, the weight and the bias."""
        hidden_ND, weight_VD, bias_V, targets_N, log_sum_N, entropy_N = ctx.saved_tensors
        softcap, temperature, tile, dtype = ctx.settings
        with torch.autocast(hidden_ND.device.type, enabled=False):
            logits = _Logits(hidden_ND, Head(weight_VD, bias_V, softcap), temperature, tile, dtype)
            outer = _Outer(targets_N, log_sum_N, entropy_N, grad_logprobs_N, grad_entropy_N)
            gradients = _Gradients.zeros(logits, ctx.needs_input_grad[:3])
            for columns, head in logits.columns():
                gradients.add(columns, logits, head, outer)
        of_hidden_ND = None if gradients.hidden_ND is None else gradients.hidden_ND.to(hidden_ND.dtype)
        return of_hidden_ND, gradients.weight_VD, gradients.bias_V, None, None, None, None


class _Outer(NamedTuple):
    """What the gradient of each token's logits hangs on."""

    targets_N: Tensor
    log_sum_N: Tensor
    entropy_N: Tensor
    grad_logprobs_N: Tensor
    grad_entropy_N: Tensor | None

    def of(self, rows: slice) -> "_Outer":
        """Of some tokens."""
        return _Outer(*(None if values_N is None else values_N[rows] for values_N in self))  # type: ignore[arg-type]


class _Gradients(NamedTuple):
    """Of the inputs that want one."""

    hidden_ND: Tensor | None
    """In at least fp32."""
    weight_VD: Tensor | None
    bias_V: Tensor | None

    @classmethod
    def zeros(cls, logits: _Logits, wanted: Sequence[bool]) -> "_Gradients":
        """To be added to."""
        wants_hidden, wants_weight, wants_bias = wanted
        weight_VD, bias_V, _ = logits.head
        return cls(
            torch.zeros_like(logits.hidden_ND, dtype=logits.precision) if wants_hidden else None,
            torch.empty_like(weight_VD) if wants_weight else None,
            torch.empty_like(bias_V) if wants_bias and bias_V is not None else None,
        )

    def add(self, columns: slice, logits: _Logits, head: Head, outer: _Outer) -> None:
        """Add what comes from a piece of the vocabulary."""
        of_weight_VD = torch.zeros_like(head.weight_VD, dtype=logits.precision)
        of_bias_V = of_weight_VD.new_zeros(len(of_weight_VD))
        for rows in logits.rows():
            z_NV = logits.of(rows, head)
            grad_NV = logits.to_products(z_NV, _grad_z(z_NV, logits.like(z_NV), columns.start, outer.of(rows)))
            if self.hidden_ND is not None:
                _add_product(self.hidden_ND[rows], grad_NV, head.weight_VD)
            if self.weight_VD is not None:
                _add_product(of_weight_VD, grad_NV.T, logits.hidden_ND[rows])
            if self.bias_V is not None:
                of_bias_V += grad_NV.sum(0)
        if self.weight_VD is not None:
            self.weight_VD[columns] = of_weight_VD.to(self.weight_VD.dtype)
        if self.bias_V is not None:
            self.bias_V[columns] = of_bias_V.to(self.bias_V.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to a total that may be in a higher precision."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _scan(logits: _Logits, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's log-probability, logarithm of the sum of exponentials, and entropy."""
    shape, device, precision = targets_N.shape, targets_N.device, logits.precision
    largest_N = torch.full(shape, -torch.inf, dtype=precision, device=device)
    sum_N, weighted_N, target_N = (torch.zeros(shape, dtype=precision, device=device) for _ in range(3))
    for columns, head in logits.columns():
        for rows in logits.rows():
            z_NV = logits.of(rows, head)
            columns_N, is_here_N = _columns(targets_N[rows], columns.start, z_NV.shape[1])
            of_target_N = z_NV.gather(1, columns_N[:, None]).squeeze(1)
            target_N[rows] = torch.where(is_here_N, of_target_N, target_N[rows])
            before_N = largest_N[rows]
            now_N = torch.maximum(before_N, z_NV.amax(dim=1))
            exp_NV = torch.exp(z_NV.sub_(now_N[:, None]), out=logits.like(z_NV))
            # What was summed under the smaller maximum, under the new one; nothing yet where that was -inf.
            shift_N = (before_N - now_N).masked_fill(before_N.isinf(), 0)
            scale_N = shift_N.exp()
            weighted_N[rows] = scale_N * (weighted_N[rows] + shift_N * sum_N[rows]) + z_NV.mul_(exp_NV).sum(dim=1)
            sum_N[rows] = scale_N * sum_N[rows] + exp_NV.sum(dim=1)
            largest_N[rows] = now_N
    log_sum_N = sum_N.log()
    # In this order: a large maximum must not swallow the logarithm.
    return target_N - largest_N - log_sum_N, largest_N + log_sum_N, log_sum_N - weighted_N / sum_N


def _columns(targets_N: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Each target's column in a piece of the vocabulary, and whether it is in there."""
    columns_N = targets_N - start
    is_here_N = (columns_N >= 0) & (columns_N < width)
    return columns_N.clamp(0, width - 1), is_here_N


def _grad_z(z_NV: Tensor, into_NV: Tensor, start: int, outer: _Outer) -> Tensor:
    """The gradient of z, written into another tile; z stays as it is."""
    grad_N1 = outer.grad_logprobs_N[:, None].to(z_NV.dtype)
    logprobs_NV = torch.sub(z_NV, outer.log_sum_N[:, None], out=into_NV)
    if outer.grad_entropy_N is None:
        grad_NV = logprobs_NV.exp_().mul_(-grad_N1)
    else:
        probabilities_NV = logprobs_NV.exp()
        inner_NV = logprobs_NV.add_(outer.entropy_N[:, None]).mul_(outer.grad_entropy_N[:, None]).add_(grad_N1)
        grad_NV = inner_NV.mul_(probabilities_NV).neg_()
    columns_N, is_here_N = _columns(outer.targets_N, start, z_NV.shape[1])
    return grad_NV.scatter_add_(1, columns_N[:, None], torch.where(is_here_N, grad_N1.squeeze(1), 0)[:, None])

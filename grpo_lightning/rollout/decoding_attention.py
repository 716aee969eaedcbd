"""Attention of decoding: one query per row, over the row's own keys and a prompt's that it may share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

if TYPE_CHECKING:
    from grpo_lightning.rollout.prefix import SharedPrefixes

NAME = "grpo_decoding"


class Attended(NamedTuple):
    """What queries read from some of their keys."""

    output: Tensor
    """[..., queries, width]: the values, weighted by the softmax over these keys alone."""
    log_total: Tensor
    """[..., queries, 1]: the logarithm of the sum of the exponentials of the scores."""


def attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, softcap: float | None = None
) -> Attended:
    """Softmax attention, with what is needed to join it to attention over further keys.

    Args:
        query: [..., queries, width], scaled.
        keys: [..., keys, width].
        values: [..., keys, width of a value].
        mask: Additive, broadcastable to [..., queries, keys]; at least one key of each query is not hidden.
        softcap: Scores are bounded to it by a hyperbolic tangent.
    """
    scores = query @ keys.transpose(-1, -2)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    largest = scores.amax(dim=-1, keepdim=True)
    weights = (scores - largest).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    return Attended((weights.to(values.dtype) @ values) / total, total.log() + largest)


def join(one: Attended, other: Attended) -> Tensor:
    r"""Attention over the keys of both.

    With :math:`s_1, s_2` the logarithms of the totals:

    .. math::
        o = (1 - w)\, o_1 + w\, o_2, \qquad w = \frac{e^{s_2}}{e^{s_1} + e^{s_2}} = \sigma(s_2 - s_1)
    """
    return torch.lerp(one.output, other.output, torch.sigmoid(other.log_total - one.log_total))


@contextmanager
def decoding_attention(config: PreTrainedConfig) -> Iterator[None]:
    """Inside, a model with this config attends by `attend`; its forward takes the argument ``prefixes``."""
    AttentionInterface.register(NAME, _attention)
    changed: Any = config
    before, changed._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        changed._attn_implementation = before


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prefixes: "SharedPrefixes | None",
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: [R, heads, 1, width] to [R, 1, heads, width]."""
    unknown = [name for name in ("position_bias", "s_aux", "sinks") if others.get(name) is not None]
    if unknown:
        raise NotImplementedError(f"attention of decoding with {', '.join(unknown)}")
    num_rows, num_heads, _, width = query.shape
    query = query.reshape(num_rows, key.shape[1], -1, width) * (width**-0.5 if scaling is None else scaling)
    found = attend(query, key, value, attention_mask, softcap=softcap)
    output = found.output
    if prefixes is not None:
        output = join(found, prefixes.attend(module.layer_idx, query, softcap=softcap))  # type: ignore[arg-type]
    return output.to(query.dtype).view(num_rows, 1, num_heads, -1), None

"""Exact attention over a flat row of many sequences, some of which continue a prompt that they share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint as recompute_in_backward

MAX_MIXED_AREA = 2**21
"""Rows of any lengths share a block of at most so many pairs of query and key: small products are mostly overhead."""
MAX_AREA = 2**24
"""Largest block, in pairs of query and key: bounds the copies of a prompt's keys that exist at once."""
MAX_WASTE = 1.2
"""Rows share a larger block while it is at most so many times the pairs of its rows."""


class Span(NamedTuple):
    """Some successive tokens of the flat row."""

    start: int
    length: int


class Tree(NamedTuple):
    """A sequence from its first position on, and what continues it: each tail sees the trunk and itself.

    Example: the row ``p p p a a b``, where a and b complete the prompt p, is
    ``Tree(Span(0, 3), (Span(3, 2), Span(5, 1)))``.
    """

    trunk: Span
    tails: tuple[Span, ...] = ()


class Tails(NamedTuple):
    """Rows of tails, Q positions each, that continue trunks of one block."""

    tokens_RQ: Tensor
    """int64, indices into the flat row; padded at the end with any."""
    trunks_R: Tensor
    """int64, which row of the block each continues."""
    masks: "_Masks"


class Block(NamedTuple):
    """Rows of trunks, Q positions each, with their tails."""

    tokens_RQ: Tensor
    tails: tuple[Tails, ...]
    masks: "_Masks"


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Who attends to whom in a flat row of N tokens, as padded rows of similar lengths."""

    blocks: tuple[Block, ...]
    tokens_M: Tensor
    """int64, the tokens of all rows, one after another."""
    order_N: Tensor
    """int64, where each token of the flat row stands among them."""

    @classmethod
    def of(cls, trees: Sequence[Tree], device: torch.device) -> "Segments":
        """Put trees of similar lengths together.

        Args:
            trees: Cover the flat row, every token once.
            device: Of the indices.
        """
        blocks = tuple(_block(part, device) for part in _cut_trees(trees))
        rows = [rows for block in blocks for rows in (block.tokens_RQ, *(tails.tokens_RQ for tails in block.tails))]
        tokens_M = torch.cat([tokens_RQ.flatten() for tokens_RQ in rows])
        num_tokens = sum(span.length for tree in trees for span in (tree.trunk, *tree.tails))
        # Padding repeats a row's last token, whose first place is the real one.
        places_M = torch.arange(len(tokens_M))
        order_N = torch.full((num_tokens,), len(tokens_M)).scatter_reduce_(0, tokens_M, places_M, "amin")
        return cls(blocks=blocks, tokens_M=tokens_M.to(device), order_N=order_N.to(device))


def segmented_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    r"""Softmax attention :math:`\mathrm{softmax}(c\tanh(q k^\top s / c))\,v` of each token over what it may see.

    A token sees the tokens of its own sequence up to itself, and those of the trunk that its sequence continues.
    Trunks are computed once, however many tails continue them.

    Args:
        query: [1, heads, N, width].
        key: [1, key-value heads, N, width]; the heads are a multiple of these.
        value: As `key`.
        segments: Of the N tokens.
        scale: s; None for one over the root of the width.
        window: How many positions, its own included, a token sees; None for all.
        softcap: c; None for none.

    Returns:
        [1, N, heads, width].
    """
    of_rows = [_rows(states, segments) for states in (query, key, value)]
    outputs = []
    for block in segments.blocks:
        trunk_q, trunk_k, trunk_v = (next(rows) for rows in of_rows)
        settings: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
        outputs.append(_attend(trunk_q, trunk_k, trunk_v, block.masks, **settings))
        for tails in block.tails:
            own_q, own_k, own_v = (next(rows) for rows in of_rows)
            attend = partial(_attend_after, own_q, own_k, own_v, trunk_k, trunk_v, tails, **settings)
            has_long_trunks = trunk_k.shape[1] > own_k.shape[1]
            outputs.append(
                recompute_in_backward(attend, use_reentrant=False, preserve_rng_state=False)
                if has_long_trunks
                else attend()
            )
    flat = torch.cat([output.flatten(0, 1) for output in outputs])
    return flat.index_select(0, segments.order_N)[None]


def _attend_after(
    query: Tensor, key: Tensor, value: Tensor, trunk_key: Tensor, trunk_value: Tensor, tails: Tails, **settings: Any
) -> Tensor:
    """Attention of tails to their trunks and themselves, each with a copy of its trunk's keys and values.

    Where these copies are larger than what is the tails' own, the caller has them made again in the backward pass.
    """
    k = torch.cat([trunk_key.index_select(0, tails.trunks_R), key], dim=1)
    v = torch.cat([trunk_value.index_select(0, tails.trunks_R), value], dim=1)
    return _attend(query, k, v, tails.masks, **settings)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, masks: "_Masks", *, scale: Any, window: int | None, softcap: float | None
) -> Tensor:
    """Attention of the rows of one shape, [R, positions, heads, width] in and out."""
    q, k, v = (states.transpose(1, 2) for states in (query, key, value))
    if softcap is not None:
        return _capped(q, k, v, masks.additive(window, q), scale, softcap).transpose(1, 2)
    is_causal = masks.is_causal(window)
    mask = None if is_causal else masks.additive(window, q)
    has_fewer_keys = k.shape[1] != q.shape[1]
    output = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=has_fewer_keys
    )
    return output.transpose(1, 2)


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, softcap: float) -> Tensor:
    """What no fused kernel does: the scores are capped before the softmax, which is taken in at least fp32."""
    num_repeats = q.shape[1] // k.shape[1]
    k, v = (states.repeat_interleave(num_repeats, dim=1) for states in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.tanh(scores / softcap) * softcap + mask
    precision = torch.promote_types(q.dtype, torch.float32)
    return torch.softmax(scores, dim=-1, dtype=precision).to(q.dtype) @ v


@dataclass(frozen=True, kw_only=True)
class _Masks:
    """Which keys the queries of a block of rows see: keys of trunks, padded to a width, then the queries' own."""

    num_queries: int
    trunk_width: int
    """0 where the rows are trunks themselves."""
    trunk_lengths: tuple[int, ...]
    """Of each row, or one number that all share."""
    device: torch.device
    made: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)

    def is_causal(self, window: int | None) -> bool:
        """Whether a plain triangle will do."""
        return not self.trunk_width and self._effective(window) is None

    def additive(self, window: int | None, like: Tensor) -> Tensor:
        """[rows or 1, 1, queries, keys]: 0 where a query sees a key, -inf elsewhere. Made once for all layers."""
        coordinates = self._effective(window), like.dtype
        if coordinates not in self.made:
            is_hidden = ~self._visible(coordinates[0])
            self.made[coordinates] = torch.zeros(is_hidden.shape, dtype=like.dtype, device=self.device).masked_fill_(
                is_hidden, -torch.inf
            )
        return self.made[coordinates]

    def _effective(self, window: int | None) -> int | None:
        longest = max(self.trunk_lengths) + self.num_queries
        return None if window is None or window >= longest else window

    def _visible(self, window: int | None) -> Tensor:
        lengths_R11 = torch.tensor(self.trunk_lengths, device=self.device)[:, None, None]
        positions_RQ1 = lengths_R11 + torch.arange(self.num_queries, device=self.device)[:, None]
        columns_K = torch.arange(self.trunk_width + self.num_queries, device=self.device)
        is_own_K = columns_K >= self.trunk_width
        positions_R1K = torch.where(is_own_K, lengths_R11 + columns_K - self.trunk_width, columns_K)
        visible = (positions_R1K <= positions_RQ1) & (is_own_K | (columns_K < lengths_R11))
        if window is not None:
            visible &= positions_RQ1 - positions_R1K < window
        return visible[:, None]


class _Rearranged(torch.autograd.Function):
    """Tokens in the order of the padded rows. Padding gets no gradient, so that none has to be added up."""

    @staticmethod
    def forward(ctx: Any, states_N: Tensor, tokens_M: Tensor, order_N: Tensor) -> Tensor:
        """Of each place of the rows, the states of its token."""
        ctx.save_for_backward(order_N)
        return states_N.index_select(0, tokens_M)

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor, None, None]:
        """Of each token, the gradient at its place in the rows."""
        (order_N,) = ctx.saved_tensors
        return grad_M.index_select(0, order_N), None, None


def _rows(states: Tensor, segments: Segments) -> Iterator[Tensor]:
    """The states of each block's and each of its tails' rows: [R, positions, heads, width]."""
    flat_N = states[0].transpose(0, 1)
    flat_M: Tensor = _Rearranged.apply(flat_N, segments.tokens_M, segments.order_N)  # type: ignore[no-untyped-call]
    shapes = [
        tokens_RQ.shape
        for block in segments.blocks
        for tokens_RQ in (block.tokens_RQ, *(tails.tokens_RQ for tails in block.tails))
    ]
    parts = flat_M.split([rows * positions for rows, positions in shapes])
    return (part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True))


def _block(trees: Sequence[Tree], device: torch.device) -> Block:
    tokens_RQ = _tokens([tree.trunk for tree in trees])
    width = tokens_RQ.shape[1]
    tails = [(row, tree.trunk.length, span) for row, tree in enumerate(trees) for span in tree.tails if span.length]
    return Block(
        tokens_RQ=tokens_RQ,
        masks=_Masks(num_queries=width, trunk_width=0, trunk_lengths=(0,), device=device),
        tails=tuple(_tails(part, width, device) for part in _cut_tails(tails, width)),
    )


def _tails(tails: Sequence[tuple[int, int, Span]], trunk_width: int, device: torch.device) -> Tails:
    tokens_RQ = _tokens([span for _, _, span in tails])
    lengths = tuple(length for _, length, _ in tails)
    return Tails(
        tokens_RQ=tokens_RQ,
        trunks_R=torch.tensor([row for row, _, _ in tails], device=device),
        masks=_Masks(
            num_queries=tokens_RQ.shape[1],
            trunk_width=trunk_width,
            trunk_lengths=lengths[:1] if len(set(lengths)) == 1 else lengths,
            device=device,
        ),
    )


def _tokens(spans: Sequence[Span]) -> Tensor:
    """The tokens of each span; the last once more where another is longer."""
    starts_R = torch.tensor([span.start for span in spans])
    lengths_R = torch.tensor([span.length for span in spans])
    columns_Q = torch.arange(int(lengths_R.max()))
    return starts_R[:, None] + torch.minimum(columns_Q, lengths_R[:, None] - 1)


def _cut_trees(trees: Sequence[Tree]) -> Iterator[list[Tree]]:
    """Trunks of similar lengths."""
    ordered = sorted(trees, key=lambda tree: -tree.trunk.length)
    sides = [tree.trunk.length for tree in ordered]
    return (ordered[part] for part in _cut([(side, side) for side in sides]))


def _cut_tails(tails: Sequence[tuple[int, int, Span]], width: int) -> Iterator[list[tuple[int, int, Span]]]:
    """Tails of similar lengths; large blocks continue trunks of one length, so that their rows share a mask."""
    ordered = sorted(tails, key=lambda tail: (-tail[1], -tail[2].length))
    longest = max((span.length for _, _, span in ordered), default=0)
    is_small = len(ordered) * longest * (width + longest) <= MAX_MIXED_AREA
    parts = [list(part) for _, part in groupby(ordered, key=lambda tail: None if is_small else tail[1])]
    for part in parts:
        for cut in _cut([(span.length, width + span.length) for _, _, span in part]):
            yield part[cut]


def _cut(sides: Sequence[tuple[int, int]]) -> Iterator[slice]:
    """Runs of rows, in their order, whose padded area is small or nearly their own."""
    start, queries, keys, own = 0, 0, 0, 0
    for i, (q, k) in enumerate(sides):
        queries, keys, own = max(queries, q), max(keys, k), own + q * k
        area = (i + 1 - start) * queries * keys
        if i > start and area > MAX_MIXED_AREA and (area > MAX_AREA or area > MAX_WASTE * own):
            yield slice(start, i)
            start, queries, keys, own = i, q, k, q * k
    if sides:
        yield slice(start, len(sides))

"""Bytes that the forward of an update leaves behind for its backward pass."""

from dataclasses import dataclass
from typing import NamedTuple

from grpo_lightning.functional.head import MAX_KEPT_LOGITS, Tile


class Tokens(NamedTuple):
    """Of a forward, as laid out."""

    computed: int
    """Through the layers."""
    predicting: int
    """Through the head."""
    repeated_keys: int
    """Tokens whose keys and values are copied for the completions that continue a shared prompt."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The sizes of a Llama-shaped decoder.

    Args:
        layers: Number of layers, L.
        hidden: Width of the residual stream, d.
        queries: Heads x width of a head, q.
        keys: Key heads x width of a head, k.
        feed_forward: Width of the gated feed-forward layer, f.
        vocabulary: V.
        additions: Bytes a token and layer that low-rank additions leave behind.
    """

    layers: int
    hidden: int
    queries: int
    keys: int
    feed_forward: int
    vocabulary: int
    additions: int = 0


class Precision(NamedTuple):
    """Of a forward."""

    itemsize: int
    """s, bytes of what the layers compute."""
    is_autocast: bool = False
    """Whether torch casts the inputs of each product by itself, and the residual stream stays in fp32."""


def layer_bytes(decoder: Decoder, precision: Precision, tokens: Tokens) -> int:
    r"""What one layer leaves behind.

    A token leaves: before each of two norms, the residual stream (r d, r bytes), and what goes into the products (s d;
    under autocast, one copy each for q, k, v, gate and up: 5 s d for both norms); queries, keys and values (q + 2 k);
    the attention's output and, in a flat row, its copy in the order of the tokens (2 q); the gate before its
    activation, what it is multiplied with, and the product (3 f):

    .. math::
        2 r d + \{2, 5\}\, s d + s\,(3 q + 2 k + 3 f)

    with r = s, or 4 under autocast. A token whose keys are repeated leaves 2 k s more.
    """
    s = precision.itemsize
    residual, copies = (4, 5) if precision.is_autocast else (s, 2)
    norms = decoder.hidden * (2 * residual + copies * s)
    rest = s * (3 * decoder.queries + 2 * decoder.keys + 3 * decoder.feed_forward)
    repeated = 2 * decoder.keys * s
    return tokens.computed * (norms + rest + decoder.additions) + tokens.repeated_keys * repeated


def activation_bytes(decoder: Decoder, precision: Precision, tokens: Tokens, *, checkpointing: bool) -> int:
    r"""What the layers, the last norm and the head leave behind.

    With B of `layer_bytes`, N computed and M predicting tokens:

    .. math::
        L B + N d\,(r + s) + M d s + H, \qquad
        \text{with checkpointing: } B + L N d r + N d\,(r + s) + M d s + H

    r is of the residual stream: s, or 4 under autocast. H is constant: logits of up to `MAX_KEPT_LOGITS` numbers are
    kept in fp32, and what more there is goes through two tiles.
    """
    s = precision.itemsize
    residual = 4 if precision.is_autocast else s
    one = layer_bytes(decoder, precision, tokens)
    inputs = tokens.computed * decoder.hidden * residual
    layers = one + decoder.layers * inputs if checkpointing else decoder.layers * one
    outside = decoder.hidden * (tokens.computed * (residual + s) + tokens.predicting * s)
    return layers + outside + head_bytes(decoder, tokens)


def head_bytes(decoder: Decoder, tokens: Tokens) -> int:
    """The kept logits, or the tiles where there are too many to be kept."""
    logits = tokens.predicting * decoder.vocabulary
    tile = Tile()
    return 4 * (logits if logits <= MAX_KEPT_LOGITS else 2 * tile.tokens * tile.vocabulary)

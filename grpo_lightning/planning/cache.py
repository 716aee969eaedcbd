"""Bytes of the keys and values of a rollout with the in-process engine."""

from typing import NamedTuple

from grpo_lightning.rollout.cache import SPARE_COLUMNS


class CacheBytes(NamedTuple):
    """Of a rollout whose completions all reach their longest length."""

    held: int
    """When the last token is drawn."""
    growing: int
    """More, for the moment in which the buffers last grew: the old ones and a copy of what is in them."""


def cache_bytes(
    *,
    prompts: int,
    group_size: int,
    prompt_tokens: int,
    new_tokens: int,
    max_rows: int | None,
    shares: bool,
    token: int,
) -> CacheBytes:
    r"""The largest cache of a rank.

    R completions are drawn at once, :math:`R = \min(\text{max\_rows}, \text{prompts} \cdot G)`, of
    :math:`U = \min(\text{prompts}, \lceil R / G \rceil + 1)` prompts at most. With p columns of a prompt and
    :math:`w(s)` columns for what is drawn from column s on (`columns`):

    .. math::
        \text{shared: } (U p + R\,w(0)) \cdot \text{token}, \qquad \text{otherwise: } R\,w(p) \cdot \text{token}

    Args:
        prompts: Of a rank.
        group_size: G.
        prompt_tokens: p, of the longest prompt.
        new_tokens: Longest completion.
        max_rows: See `InProcessEngine`.
        shares: Whether a prompt is held once for its completions.
        token: Bytes of a token's keys and values in all layers: 2 x layers x key heads x width x bytes of a number.
    """
    every = prompts * group_size
    rows = min(max_rows or every, every)
    width, before = columns(0 if shares else prompt_tokens, new_tokens)
    held_prompts = min(prompts, -(-rows // group_size) + 1) * prompt_tokens if shares else 0
    return CacheBytes((held_prompts + rows * width) * token, 2 * rows * before * token)


def columns(start: int, new_tokens: int) -> tuple[int, int]:
    """The buffers' columns at the end, and before they last grew (0 if never), as `RowCache.advance` has them grow.

    Buffers begin with some spare columns. Where these are used up at column w, max(spare, w / 2) more are made.
    """
    width, before = start + SPARE_COLUMNS, 0
    while width < start + new_tokens:  # the last token that is drawn is not read any more
        width, before = width + max(SPARE_COLUMNS, width // 2), width
    return width, before

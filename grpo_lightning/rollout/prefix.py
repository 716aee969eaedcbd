"""Attention of many rows to one copy of the prompt that they share."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from grpo_lightning.rollout.cache import RowCache
from grpo_lightning.rollout.prefill import PromptStates

NAME = "grpo_shared_prefix"


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


class SharedPrefixes:
    """The keys and values of U prompts, each held once, and which of R rows continues which of them.

    The queries of a prompt's rows are laid side by side, so that they read its keys in one matrix product::

        row      0 1 2 3 4        prompt a: 0 2 4      prompt b has a place that is left empty: it is filled
        prompt   a b a b a        prompt b: 1 3 .      with row 0, and what that reads there goes nowhere
    """

    def __init__(self) -> None:
        self._names: list[int] = []
        self._lengths: list[int] = []
        self._owners: list[int] = []
        """The prompt's name of each row."""
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._mask: Tensor | None = None
        self._rows_UG = torch.empty(0, 0, dtype=torch.long)
        """The row of each place."""
        self._places_R: Tensor | None = None
        """The place of each row, counted through; None where they are the rows in their order."""

    def append(
        self, states: PromptStates, prompts: Sequence[int], names: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """Add rows.

        Args:
            states: Of the prompts that they continue.
            prompts: Which of these each new row continues.
            names: The prompts' names: where one is known already, its keys are not held again.
            lengths: The number of tokens of each new row's prompt.
        """
        new = {name: (prompt, length) for prompt, name, length in zip(prompts, names, lengths, strict=True)}
        new = {name: place for name, place in new.items() if name not in self._names}
        index = torch.tensor([prompt for prompt, _ in new.values()], dtype=torch.long, device=states.keys[0].device)
        self._owners += names
        if new:
            self._names += new
            self._lengths += [length for _, length in new.values()]
            self._keys = self._extended(self._keys, states.keys, index)
            self._values = self._extended(self._values, states.values, index)
        self._arrange()

    def keep(self, rows: Sequence[int]) -> None:
        """Let rows go, and the prompts that none continues any more.

        Args:
            rows: For each row that is left, which one it was.
        """
        self._owners = [self._owners[row] for row in rows]
        live = set(self._owners)
        kept = [i for i, name in enumerate(self._names) if name in live]
        if len(kept) < len(self._names):
            self._names, self._lengths = [self._names[i] for i in kept], [self._lengths[i] for i in kept]
            index = torch.tensor(kept, dtype=torch.long, device=self._keys[0].device)
            longest = max(self._lengths, default=0)
            for buffers in (self._keys, self._values):
                buffers[:] = [buffer.index_select(0, index)[:, :, buffer.shape[2] - longest :] for buffer in buffers]
        self._arrange()

    def attend(self, layer: int, query: Tensor, *, softcap: float | None = None) -> Attended:
        """What each row reads from its prompt.

        Args:
            layer: The layer's number.
            query: [R, key heads, queries per key head, width], scaled.
            softcap: See `attend`.
        """
        num_prompts, size = self._rows_UG.shape
        _, heads, share, width = query.shape
        if self._places_R is not None:
            query = query.index_select(0, self._rows_UG.flatten())
        grouped = query.view(num_prompts, size, heads, share, width).transpose(1, 2).flatten(2, 3)
        found = attend(grouped, self._keys[layer], self._values[layer], self._mask, softcap=softcap)
        output, log_total = (
            part.unflatten(2, (size, share)).transpose(1, 2).reshape(num_prompts * size, heads, share, -1)
            for part in found
        )
        if self._places_R is None:
            return Attended(output, log_total)
        return Attended(output.index_select(0, self._places_R), log_total.index_select(0, self._places_R))

    def _extended(self, held: list[Tensor], layers: Sequence[Tensor], index: Tensor) -> list[Tensor]:
        """The held buffers with further prompts, aligned at their ends in as many columns as the longest needs."""
        longest = max(self._lengths)
        added = [_columns(states.index_select(0, index), longest) for states in layers]
        return (
            [torch.cat((_columns(old, longest), new)) for old, new in zip(held, added, strict=True)] if held else added
        )

    def _arrange(self) -> None:
        """Lay the rows of each prompt side by side, and hide what lies before the shorter prompts."""
        rows_by_name: dict[int, list[int]] = {name: [] for name in self._names}
        for row, name in enumerate(self._owners):
            rows_by_name[name].append(row)
        size = max(map(len, rows_by_name.values()), default=0)
        device = self._keys[0].device
        places = [rows + [0] * (size - len(rows)) for rows in rows_by_name.values()]
        self._rows_UG = torch.tensor(places, dtype=torch.long, device=device).view(len(places), size)
        flat = {row: u * size + g for u, rows in enumerate(rows_by_name.values()) for g, row in enumerate(rows)}
        order = [flat[row] for row in range(len(self._owners))]
        is_in_order = order == list(range(len(places) * size))
        self._places_R = None if is_in_order else torch.tensor(order, dtype=torch.long, device=device)
        self._mask = None
        if len(set(self._lengths)) > 1:
            longest = max(self._lengths)
            starts_U = torch.tensor([longest - length for length in self._lengths], device=device)
            is_hidden_UL = torch.arange(longest, device=device)[None] < starts_U[:, None]
            mask_UL = self._keys[0].new_zeros(is_hidden_UL.shape).masked_fill_(is_hidden_UL, -torch.inf)
            self._mask = mask_UL[:, None, None]


def _columns(buffer: Tensor, width: int) -> Tensor:
    """The last columns of a buffer, with zeros before them where it has fewer."""
    missing = width - buffer.shape[2]
    return nn.functional.pad(buffer, (0, 0, missing, 0)) if missing > 0 else buffer[:, :, -missing:]


class SharingCache(RowCache):
    """A cache whose rows hold their own tokens alone, and read their prompts where these are held once."""

    def __init__(self) -> None:
        super().__init__()
        self._prefixes = SharedPrefixes()

    def begin(self, *, num_rows: int, longest_prompt: int) -> None:  # noqa: ARG002 - no row holds its prompt
        """Empty the cache, keeping its memory."""
        super().begin(num_rows=num_rows, longest_prompt=0)
        self._prefixes = SharedPrefixes()

    def append(
        self, prompts: PromptStates, prompt_of_row: Sequence[int], lengths: Sequence[int], names: Sequence[int]
    ) -> None:
        """Add rows that continue prompts."""
        super().append(prompts.without_columns(), prompt_of_row, [0] * len(lengths), names)
        self._prefixes.append(prompts, prompt_of_row, names, lengths)

    def remove(self, rows: Sequence[int]) -> list[int]:
        """Take rows out."""
        order = super().remove(rows)
        self._prefixes.keep(order)
        return order

    @contextmanager
    def reading(self, model: PreTrainedModel) -> Iterator[dict[str, Any]]:
        """Give the model the attention that reads shared prompts."""
        with _shared_prefix_attention(model.config.get_text_config()):
            yield {"prefixes": self._prefixes}


@contextmanager
def _shared_prefix_attention(config: PreTrainedConfig) -> Iterator[None]:
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
    prefixes: SharedPrefixes,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: [R, heads, 1, width] to [R, 1, heads, width]."""
    unknown = [name for name in ("position_bias", "s_aux", "sinks") if others.get(name) is not None]
    if unknown:
        raise NotImplementedError(f"attention to a shared prefix with {', '.join(unknown)}")
    num_rows, num_heads, _, width = query.shape
    query = query.reshape(num_rows, key.shape[1], -1, width) * (width**-0.5 if scaling is None else scaling)
    own = attend(query, key, value, attention_mask, softcap=softcap)
    found = prefixes.attend(module.layer_idx, query, softcap=softcap)  # type: ignore[arg-type]
    output = join(own, found).to(query.dtype)
    return output.view(num_rows, 1, num_heads, -1), None

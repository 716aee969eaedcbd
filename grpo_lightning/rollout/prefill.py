"""Reading prompts: one forward per distinct prompt, whose keys and values its whole group starts from."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from grpo_lightning.rollout.attention import AttentionPattern

_TOKENS_PER_FORWARD = 8192


@dataclass(frozen=True, kw_only=True)
class PromptStates:
    """What the model computed for U prompts, aligned at their ends in L columns."""

    keys: tuple[Tensor, ...]
    """Of each layer, [U, heads, L, width]; meaningless before a prompt's first token."""
    values: tuple[Tensor, ...]
    logits_UV: Tensor
    """The logits after each prompt's last token."""

    def select(self, prompt: int) -> "PromptStates":
        """A copy of one prompt's states, which does not hold on to the others' memory."""
        return PromptStates(
            keys=tuple(keys[prompt : prompt + 1].clone() for keys in self.keys),
            values=tuple(values[prompt : prompt + 1].clone() for values in self.values),
            logits_UV=self.logits_UV[prompt : prompt + 1].clone(),
        )

    def without_columns(self) -> "PromptStates":
        """The states of no token, for rows that do not hold their prompts."""
        return PromptStates(
            keys=tuple(keys[:, :, :0] for keys in self.keys),
            values=tuple(values[:, :, :0] for values in self.values),
            logits_UV=self.logits_UV,
        )


def prefill(model: PreTrainedModel, prompts: Sequence[Sequence[int]], pattern: AttentionPattern) -> PromptStates:
    """Run prompts through the model together.

    Args:
        model: Any causal language model of transformers.
        prompts: Token ids, at least one per prompt.
        pattern: The model's attention layers.
    """
    length = max(map(len, prompts))
    padding_U = torch.tensor([length - len(prompt) for prompt in prompts], device=model.device)
    columns_L = torch.arange(length, device=model.device)
    is_padded = bool(padding_U.any())
    # Without the config: with it, sliding layers would forget what lies before their window.
    cache = DynamicCache()
    output = model(
        # Any token will do as padding: nothing real attends to it.
        input_ids=torch.tensor([[0] * (length - len(p)) + list(p) for p in prompts], device=model.device),
        position_ids=(columns_L[None] - padding_U[:, None]).clamp(min=0),
        attention_mask=_masks(padding_U, columns_L, model.dtype, pattern) if is_padded else None,
        past_key_values=cache,
        use_cache=True,
        **({"logits_to_keep": 1} if _keeps_logits(model) else {}),
    )
    layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    return PromptStates(
        keys=tuple(_as_multiplied(layer.keys) for layer in layers if layer.keys is not None),
        values=tuple(_as_multiplied(layer.values) for layer in layers if layer.values is not None),
        logits_UV=output.logits[:, -1],
    )


def _as_multiplied(states: Tensor) -> Tensor:
    """In the precision that products are made in: under autocast every later step would cast all of them again."""
    device = states.device.type
    if not torch.is_autocast_enabled(device) or states.dtype == torch.float64:  # which autocast leaves alone
        return states
    return states.to(torch.get_autocast_dtype(device))


def chunks(lengths: Sequence[int]) -> Iterator[slice]:
    """Cut prompts, sorted by length, into forwards of a bounded number of padded tokens."""
    start = 0
    for i, length in enumerate(lengths):
        if i > start and (i + 1 - start) * max(lengths[start], length) > _TOKENS_PER_FORWARD:
            yield slice(start, i)
            start = i
    if lengths:
        yield slice(start, len(lengths))


def _masks(
    padding_U: Tensor, columns_L: Tensor, dtype: torch.dtype, pattern: AttentionPattern
) -> Tensor | dict[str, Tensor]:
    is_padding_UL = columns_L[None] < padding_U[:, None]
    distances_LL = columns_L[:, None] - columns_L[None]
    # Padding attends to padding only. It is never read, but attending to nothing at all would make it NaN.
    is_hidden_ULL = (distances_LL < 0)[None] | (is_padding_UL[:, None, :] & ~is_padding_UL[:, :, None])
    mask = torch.zeros(is_hidden_ULL.shape, dtype=dtype, device=padding_U.device).masked_fill_(
        is_hidden_ULL, -torch.inf
    )
    return pattern.masks(mask[:, None], distances_LL)


def _keeps_logits(model: PreTrainedModel) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return "logits_to_keep" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

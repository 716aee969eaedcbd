"""Which earlier tokens a decoded token may attend to."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from grpo_lightning.types import ConfigurationError

_FULL, _SLIDING = "full_attention", "sliding_attention"

Masks = Tensor | dict[str, Tensor]
"""An additive mask for all layers, or one for each kind of layer."""


@dataclass(frozen=True, kw_only=True)
class AttentionPattern:
    """The kinds of attention layers in a model.

    Args:
        kinds: Names of transformers, "full_attention" or "sliding_attention".
        window: How many positions, its own included, a sliding layer sees.
    """

    kinds: frozenset[str]
    window: int | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "AttentionPattern":
        """The pattern of a model's text decoder.

        Raises:
            ConfigurationError: The model has layers that are no attention over cached keys and values.
        """
        window = getattr(config, "sliding_window", None)
        layer_types = getattr(config, "layer_types", None)
        kinds = frozenset(layer_types or [_FULL if window is None else _SLIDING])
        unknown = sorted(kinds - {_FULL, _SLIDING})
        if unknown or getattr(config, "attention_chunk_size", None) is not None:
            raise ConfigurationError(
                f"model.engine: InProcessEngine decodes full and sliding-window attention; the policy "
                f"({config.model_type}) has {', '.join(unknown) or 'chunked_attention'} layers."
            )
        return cls(kinds=kinds, window=window if _SLIDING in kinds else None)

    def masks(self, mask: Tensor, distances: Tensor) -> Masks:
        """The mask of each kind of layer, in the form that the models of transformers take.

        Args:
            mask: Additive, [rows, 1, queries, keys]: -inf where a query must not see a key.
            distances: int64, [queries, keys]: how many positions a key lies before its query.
        """
        if self.window is None:
            return mask
        sliding = mask.masked_fill(distances >= self.window, -torch.inf)
        return {_FULL: mask, _SLIDING: sliding} if _FULL in self.kinds else sliding

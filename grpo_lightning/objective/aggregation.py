"""Aggregations: how the tokens of a minibatch are weighed against each other."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from grpo_lightning.functional.aggregate import sequence_mean_token_mean, token_mean
from grpo_lightning.types import MinibatchCounts


class Aggregation(ABC):
    """Sums the values of some completions, divided by what the whole global minibatch counts."""

    @abstractmethod
    def __call__(self, values_BT: Tensor, mask_BT: Tensor, counts: MinibatchCounts) -> Tensor:
        """A scalar; those of any partition of the minibatch add up to that of the whole."""


@dataclass(frozen=True, kw_only=True)
class SequenceMeanTokenMean(Aggregation):
    """The mean over completions of the mean over their tokens (DeepSeekMath, equation 3)."""

    def __call__(self, values_BT: Tensor, mask_BT: Tensor, counts: MinibatchCounts) -> Tensor:
        """See `sequence_mean_token_mean`."""
        return sequence_mean_token_mean(values_BT, mask_BT, num_sequences=max(counts.sequences, 1))


@dataclass(frozen=True, kw_only=True)
class TokenMean(Aggregation):
    """The mean over all tokens of the global minibatch."""

    def __call__(self, values_BT: Tensor, mask_BT: Tensor, counts: MinibatchCounts) -> Tensor:
        """See `token_mean`."""
        return token_mean(values_BT, mask_BT, num_tokens=max(counts.tokens, 1))

"""Aggregations: how the tokens of a minibatch are weighed against each other."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from grpo_lightning.functional.aggregate import (
    prompt_mean_token_mean,
    sequence_mean_token_mean,
    sequence_sum,
    token_mean,
)
from grpo_lightning.objective.settings import require
from grpo_lightning.types import LossBatch, MinibatchCounts


class Aggregation(ABC):
    """Sums the values of some completions, divided by what the whole global minibatch counts."""

    @abstractmethod
    def __call__(self, values_BT: Tensor, batch: LossBatch, counts: MinibatchCounts) -> Tensor:
        """A scalar; those of any partition of the minibatch add up to that of the whole.

        Args:
            values_BT: Of each token, or of shape [B, 1] where a completion's tokens all have the same.
            batch: The completions that they belong to.
            counts: Of the whole global minibatch.
        """


@dataclass(frozen=True, kw_only=True)
class SequenceMeanTokenMean(Aggregation):
    """The mean over completions of the mean over their tokens (DeepSeekMath, equation 3)."""

    def __call__(self, values_BT: Tensor, batch: LossBatch, counts: MinibatchCounts) -> Tensor:
        """See `sequence_mean_token_mean`."""
        return sequence_mean_token_mean(values_BT, batch.mask_BT, num_sequences=max(counts.sequences, 1))


@dataclass(frozen=True, kw_only=True)
class TokenMean(Aggregation):
    """The mean over all tokens of the global minibatch: what most code means by DAPO's loss."""

    def __call__(self, values_BT: Tensor, batch: LossBatch, counts: MinibatchCounts) -> Tensor:
        """See `token_mean`."""
        return token_mean(values_BT, batch.mask_BT, num_tokens=max(counts.tokens, 1))


@dataclass(frozen=True, kw_only=True)
class PromptMeanTokenMean(Aggregation):
    """The mean over prompts of the mean over all tokens of the prompt's group: DAPO's equation 12 as it is written."""

    def __call__(self, values_BT: Tensor, batch: LossBatch, counts: MinibatchCounts) -> Tensor:
        """See `prompt_mean_token_mean`."""
        return prompt_mean_token_mean(values_BT, batch.mask_BT, batch.group_tokens_B, num_groups=max(counts.groups, 1))


@dataclass(frozen=True, kw_only=True)
class SequenceSum(Aggregation):
    """The mean over completions of the sum over their tokens: the policy gradient itself."""

    def __call__(self, values_BT: Tensor, batch: LossBatch, counts: MinibatchCounts) -> Tensor:
        """See `sequence_sum`."""
        return sequence_sum(values_BT, batch.mask_BT, num_sequences=max(counts.sequences, 1))


@dataclass(frozen=True, kw_only=True)
class ConstantLength(Aggregation):
    """`SequenceSum` divided by a constant, which takes the length bias out of the loss (Dr. GRPO).

    https://arxiv.org/abs/2503.20783

    Args:
        length: In tokens, > 0: the generation budget of the paper, `model.sampling.max_new_tokens`. It scales the
            gradient, and so matters to the clipping of its norm, not to Adam.
    """

    length: float

    def __post_init__(self) -> None:
        require(self.length > 0, "aggregation.length", "> 0", self.length)

    def __call__(self, values_BT: Tensor, batch: LossBatch, counts: MinibatchCounts) -> Tensor:
        """See `sequence_sum`."""
        return sequence_sum(values_BT, batch.mask_BT, num_sequences=max(counts.sequences, 1)) / self.length

"""What happens to groups between scoring and the update."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from grpo_lightning.functional.advantages import has_zero_variance


class GroupFilter(ABC):
    """Decides which groups the update learns from."""

    max_rounds: int = 1
    """Most often an iteration draws prompts: more than 1 to replace the groups that are left out."""

    @abstractmethod
    def keep(self, rewards_PG: Tensor, valid_PG: Tensor) -> Tensor:
        """bool, per group. The others take no part in the loss or in its denominators."""


class KeepAll(GroupFilter):
    """Every group, also those without a signal: the plain GRPO of the paper."""

    def keep(self, rewards_PG: Tensor, valid_PG: Tensor) -> Tensor:  # noqa: ARG002 - nothing to look at
        """All true."""
        return torch.ones(len(rewards_PG), dtype=torch.bool)


class DropZeroVariance(GroupFilter):
    """Only groups whose rewards differ: the others have no advantage, and would only dilute the mean."""

    def keep(self, rewards_PG: Tensor, valid_PG: Tensor) -> Tensor:
        """See `has_zero_variance`."""
        return ~has_zero_variance(rewards_PG, valid_PG)

"""Groups without a signal are replaced."""

from torch import Tensor

from grpo_lightning.functional.advantages import has_zero_variance
from grpo_lightning.groups.filter import GroupFilter
from grpo_lightning.types import ConfigurationError


class DynamicSampling(GroupFilter):
    """Draws further prompts until every group of the iteration has rewards that differ.

    Source: DAPO, equation 11 and Algorithm 1 (https://arxiv.org/abs/2503.14476). A round draws as many prompts as an
    iteration has, and no prompt is drawn twice in an iteration. Groups beyond what the iteration needs are thrown
    away. Where the rounds end too early, since everything is solved or hopeless, the update learns from the groups
    that there are, and it is said. `reward/...` and `completion/...` are of everything that was drawn.

    Args:
        max_rounds: Most often an iteration draws, the first time included, >= 1.

    Raises:
        ConfigurationError: `max_rounds` is less than 1.
    """

    def __init__(self, max_rounds: int = 4) -> None:
        if max_rounds < 1:
            raise ConfigurationError(f"model.groups.max_rounds must be >= 1, got {max_rounds}.")
        self.max_rounds = max_rounds

    def keep(self, rewards_PG: Tensor, valid_PG: Tensor) -> Tensor:
        """See `has_zero_variance`."""
        return ~has_zero_variance(rewards_PG, valid_PG)

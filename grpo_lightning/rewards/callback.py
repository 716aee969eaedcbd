"""The contract of a reward: a Lightning callback with a name, a weight and a `score`."""

from abc import abstractmethod
from collections.abc import Sequence

from lightning.pytorch.callbacks import Callback

from grpo_lightning.types import Completion, ConfigurationError, Prompt, Score


class RewardCallback(Callback):
    """Scores completions. Each reward callback of the Trainer is one column of the rewards.

    Subclass it, implement `score`, and name the class under `trainer.callbacks`::

        class Brevity(RewardCallback):
            def score(self, prompts, completions):
                return [-len(completion.token_ids) / 100 for completion in completions]

    Args:
        name: Unique among the run's rewards; metrics are logged as ``reward/<name>/...``.
        weight: Factor of this reward in a completion's total. 0 logs the reward without training on it.
    """

    def __init__(self, name: str, weight: float = 1.0) -> None:
        super().__init__()
        if not name or "/" in name:
            raise ConfigurationError(f"A reward's `name` must be non-empty and without '/', got {name!r}.")
        self.name = name
        self.weight = weight

    @property
    def state_key(self) -> str:
        """Tells two rewards of one class apart in a checkpoint."""
        return f"{type(self).__qualname__}[{self.name}]"

    @abstractmethod
    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[Score]:
        """Score each completion of `completions`; `prompts[i]` is the prompt of `completions[i]`.

        Returns:
            One score per completion, in order. None: this reward does not apply to it. NaN or an exception: a
            failure, which excludes the completion from its group's statistics and from the update.
        """

    def answer(self, completion: Completion) -> str | None:
        """The final answer that `completion` gives, for majority voting; None where it gives none."""
        return completion.text.strip() or None

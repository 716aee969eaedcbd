"""The rollouts of a run: what the engine is asked for, and with which weights."""

from abc import ABC
from collections.abc import Sequence

from grpo_lightning.batching import IterationShape
from grpo_lightning.data import PromptStream
from grpo_lightning.models import ModelsOfARun
from grpo_lightning.rollout import draw_groups
from grpo_lightning.types import Coordinates, Prompt, Rollout, Stream


class RolloutsOfARun(ModelsOfARun, ABC):
    """Asks the engine for completions."""

    iteration: int
    shape: IterationShape
    prompts: PromptStream

    def next_rollout(self) -> Rollout:
        """The completions of this iteration."""
        return self.generate(self.prompts.take_distinct(self.shape.prompts_per_iteration))

    def generate(self, prompts: Sequence[Prompt], *, first_slot: int = 0) -> Rollout:
        """Draw a group of completions of each of this rank's prompts; the slots are dealt out to the ranks in turn."""
        with self.phase("generate"), self.whole_policy():
            return draw_groups(
                self.engine,
                dict(enumerate(prompts, start=first_slot)),
                slots=range(first_slot + self.global_rank, first_slot + len(prompts), self.trainer.world_size),
                group_size=self.shape.group_size,
                sampling=self.sampling,
                coordinates=Coordinates(seed=self.seed, stream=Stream.TRAINING, iteration=self.iteration),
            )

    def teardown(self, stage: str) -> None:  # noqa: ARG002
        """Give back what the engine holds."""
        self.engine.close()

    def announce_weights(self, version: int) -> None:
        """Tell the engine that the policy's weights have changed.

        Args:
            version: The number of optimizer steps behind them.
        """
        assert self.policy is not None
        self.engine.update_weights(self.policy.weights, version)

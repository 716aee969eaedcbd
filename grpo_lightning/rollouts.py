"""The rollouts of a run: what the engine is asked for, when, and from which weights."""

from abc import ABC
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from lightning.pytorch.utilities import rank_zero_info

from grpo_lightning.batching import IterationShape
from grpo_lightning.data import PromptStream
from grpo_lightning.models import ModelsOfARun
from grpo_lightning.rollout import (
    DrawsAhead,
    RolloutAhead,
    RolloutEngine,
    RolloutLostError,
    begin_groups,
    draw_groups,
    together,
)
from grpo_lightning.rollout.lockstep import lockstep
from grpo_lightning.stock_callbacks import averages_weights
from grpo_lightning.strategies.gathering import gathered_size
from grpo_lightning.types import Coordinates, Prompt, Rollout, Stream

_PATIENCE_SECONDS = 10.0
"""Longest wait for an engine to end what it is drawing when it is closed."""


class RolloutsOfARun(ModelsOfARun, ABC):
    """Asks the engine for completions.

    With `draw_ahead` the rollout of iteration i + 1 begins as soon as that of iteration i has been taken, whose updates
    run meanwhile: it is always drawn from the weights after iteration i - 1. One at most is in flight.
    """

    draw_ahead: bool
    iteration: int
    shape: IterationShape
    prompts: PromptStream
    ahead: RolloutAhead | None = None
    """The next iteration's rollout; at the beginning of an iteration, its own."""
    hidden_seconds: float = 0.0
    """For how long completions were drawn while the run did something else."""

    def next_rollout(self) -> Rollout:
        """The completions of this iteration; with `draw_ahead`, those of the next one are begun."""
        rollout = self.generate(self._take_prompts()) if self.ahead is None else self._arrived(self.ahead)
        self.ahead = self._begun() if self.draw_ahead and not self._is_last_iteration else None
        return rollout

    def generate(self, prompts: Sequence[Prompt], *, first_slot: int = 0) -> Rollout:
        """Draw a group of completions of each of this rank's prompts; the slots are dealt out to the ranks in turn."""
        draw = partial(
            draw_groups,
            self.engine,
            dict(enumerate(prompts, start=first_slot)),
            slots=range(first_slot + self.global_rank, first_slot + len(prompts), self.trainer.world_size),
            group_size=self.shape.group_size,
            sampling=self.sampling,
            coordinates=self._coordinates(self.iteration),
        )
        with self.phase("generate"):
            return self.draw_unless_stopped(draw)

    def _begun(self) -> RolloutAhead:
        """The next iteration's completions, from the weights of this moment, in the background."""
        assert isinstance(self.engine, DrawsAhead), "preconditions see to it"
        prompts = self._take_prompts()
        with self.phase("generate"), self.drawable_policy():
            return begin_groups(
                self.engine,
                prompts,
                slots=range(self.global_rank, len(prompts), self.trainer.world_size),
                group_size=self.shape.group_size,
                sampling=self.sampling,
                coordinates=self._coordinates(self.iteration + 1),
            )

    def _arrived(self, ahead: RolloutAhead) -> Rollout:
        """What was drawn ahead; where a rank has lost its share, all draw again, from the weights of now."""
        try:
            with self.phase("generate"), together():
                self.stopping.unless_stopped(ahead.wait, can_break_off=True)
                rollout = ahead.rollout()
        except RolloutLostError as error:
            rank_zero_info(f"Iteration {self.iteration}: its completions, drawn ahead, are drawn again: {error}")
            return self.generate(ahead.prompts)
        self.hidden_seconds += ahead.hidden_seconds
        return rollout

    def idle_engine(self) -> RolloutEngine:
        """The engine, when it has drawn what it is drawing."""
        if self.ahead is not None:
            self.ahead.wait()
        return self.engine

    @contextmanager
    def drawable_policy(self) -> Iterator[None]:
        """Inside, the engine can draw from the policy's weights, on each rank as much as it likes. A collective."""
        assert self.policy is not None
        placement, policy = self.placement, self.policy
        if self.engine.has_copy:
            yield
        elif self.engine.gather == "whole":
            with placement.whole(policy), _uncompiled():
                yield
        else:
            called_together = placement.called_together(policy)
            with called_together as pass_by, lockstep(policy.model, pass_by, self.device), _uncompiled():
                yield

    def say_what_is_gathered(self) -> None:
        """What rollouts put together of weights that are in shards, and what that costs."""
        placement, policy = self.placement, self.policy
        assert policy is not None
        if placement.cuts_weights and not self.engine.has_copy:
            size = gathered_size(policy, lambda weight: placement.shape(weight).numel() * placement.itemsize(weight))
            rank_zero_info(size.in_words(self.engine.gather))

    def on_validation_epoch_start(self) -> None:
        """Validate an average, where there is one: engines with a copy of the weights are told."""
        if averages_weights(self.trainer):
            self.announce_weights(self.trainer.global_step)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics, and go on with the policy's own weights."""
        super().on_validation_epoch_end()
        if averages_weights(self.trainer):
            self.announce_weights(self.trainer.global_step)

    def announce_weights(self, version: int) -> None:
        """Tell the engine that the policy's weights have changed.

        Args:
            version: The number of optimizer steps behind them.
        """
        assert self.policy is not None
        self.engine.update_weights(self.policy.weights, version)

    def teardown(self, stage: str) -> None:  # noqa: ARG002
        """Give back what the engine holds, which ends what it is drawing."""
        self.engine.close()
        if self.ahead is not None:
            self.ahead.wait(_PATIENCE_SECONDS)
            self.ahead = None

    def _take_prompts(self) -> list[Prompt]:
        return self.prompts.take_distinct(self.shape.prompts_per_iteration)

    def _coordinates(self, iteration: int) -> Coordinates:
        return Coordinates(seed=self.seed, stream=Stream.TRAINING, iteration=iteration)

    @property
    def _is_last_iteration(self) -> bool:
        return self.trainer.global_step + self.shape.num_updates >= self.trainer.estimated_stepping_batches


def _uncompiled() -> AbstractContextManager[None]:
    """Inside, blocks are called as if they were not compiled: each token's keys and values have another shape."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance

"""The Trainer's loops over held-out prompts: validation, test and prediction."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningModule

from grpo_lightning.ending import EndTogether, Stopping
from grpo_lightning.evaluation import EvaluationMetrics
from grpo_lightning.rewards import RewardCallback, score_rollout
from grpo_lightning.rollout import RolloutEngine, draw_each
from grpo_lightning.types import Coordinates, EvaluationPrompt, SamplingParams, Stream

T = TypeVar("T")


class HeldOutLoops(LightningModule, ABC):
    """Completes and judges held-out prompts, with random numbers of their own."""

    engine: RolloutEngine
    sampling: SamplingParams
    seed: int
    held_out: EvaluationMetrics
    reward_callbacks: list[RewardCallback]

    def __init__(self) -> None:
        super().__init__()
        self.stopping = Stopping()

    def configure_callbacks(self) -> list[Callback]:
        """The one that every run has."""
        return [EndTogether(self.stopping)]

    @abstractmethod
    def drawable_policy(self) -> AbstractContextManager[None]:
        """Inside, the engine can draw, on each rank as much as it likes. Entered by all ranks together."""

    @abstractmethod
    def idle_engine(self) -> RolloutEngine:
        """The engine, when it does nothing else."""

    @abstractmethod
    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time a stage."""

    def validation_step(self, batch: list[EvaluationPrompt], batch_idx: int) -> None:  # noqa: ARG002
        """Complete and judge some held-out prompts."""
        self._judge(batch, Stream.VALIDATION)

    def test_step(self, batch: list[EvaluationPrompt], batch_idx: int) -> None:  # noqa: ARG002
        """As `validation_step`, with random numbers of its own."""
        self._judge(batch, Stream.TEST)

    def predict_step(self, batch: list[EvaluationPrompt], batch_idx: int) -> list[dict[str, Any]]:  # noqa: ARG002
        """The completions of some prompts, drawn as `model.sampling` says; see `draw_each`."""
        coordinates = Coordinates(seed=self.seed, stream=Stream.PREDICT, iteration=0)
        with self.drawable_policy():
            return draw_each(self.idle_engine(), batch, self.sampling, coordinates)

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_held_out("validation")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log_held_out("test")

    def evaluate(self, dataloader: Any, *, stream: Stream) -> dict[str, float]:
        """Evaluate outside the Trainer's loops, and log nothing."""
        for batch in dataloader:
            self._judge(batch, stream)
        return {name: float(value) for name, value in self.held_out.take().items()}

    def _judge(self, batch: list[EvaluationPrompt], stream: Stream) -> None:
        with self.phase("evaluate"):
            judge = partial(
                self.held_out.evaluate,
                batch,
                engine=self.idle_engine(),
                sampling=self.sampling,
                coordinates=Coordinates(seed=self.seed, stream=stream, iteration=0),
                score=lambda prompts, completions: score_rollout(self.reward_callbacks, prompts, completions),
                rewards=self.reward_callbacks,
            )
            self.draw_unless_stopped(judge)

    def draw_unless_stopped(self, draw: Callable[[], T]) -> T:
        """Let the engine draw from the policy's weights. All ranks leave it together: a collective.

        Args:
            draw: Asks the engine, as often as it likes.

        Raises:
            StoppedRun: The run was asked to stop.
        """
        if self.engine.draws_alone:  # it can be broken off, and putting the weights together cannot
            with self.drawable_policy():
                return self.stopping.unless_stopped(draw, can_break_off=True)

        def draw_together() -> T:
            with self.drawable_policy():  # the ranks are in step until all have left it
                return draw()

        return self.stopping.unless_stopped(draw_together, can_break_off=False)

    def _log_held_out(self, stage: str) -> None:
        self.log_dict({f"{stage}/{name}": value for name, value in self.held_out.take().items()}, batch_size=1)

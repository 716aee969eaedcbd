"""GRPO as a LightningModule: the order of the stages, and nothing else."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo_lightning.admission import CheckedSettings
from grpo_lightning.batching import Experience, Forward, IterationShape, Layout, SharedPrefix, usable_layout
from grpo_lightning.batching.comparison import scored_groups
from grpo_lightning.batching.limit import warn_of_long_sequences
from grpo_lightning.batching.minibatches import cut_into_minibatches, global_counts
from grpo_lightning.controllers import tell_controllers
from grpo_lightning.data import PromptDataModule, PromptStream
from grpo_lightning.epochs import epoch_of, overfitted
from grpo_lightning.evaluation import Evaluation, EvaluationMetrics
from grpo_lightning.groups import GroupFilter, GroupOutcome, KeepAll, Refill, ScoredRollout, Selection
from grpo_lightning.metrics import UpdateStatistics, learning_metrics, log_metrics, rollout_metrics
from grpo_lightning.objective import Objective
from grpo_lightning.objective.settings import described
from grpo_lightning.optim import Schedule, apply_settings, settings
from grpo_lightning.phases import timed_phase
from grpo_lightning.policy import Compile, LoRA, PolicySource
from grpo_lightning.preconditions import check_alignment, check_configuration, check_draw_ahead, check_trainer
from grpo_lightning.preparation import Preparation
from grpo_lightning.ranks import exchange_over_ranks
from grpo_lightning.resuming import Boundary, check_base, check_weights, own_state, rollout_ahead, take_up, weights_of
from grpo_lightning.rewards import check_failure_rate, score_rollout
from grpo_lightning.rollout import InProcessEngine, RolloutEngine
from grpo_lightning.ticks import Tick, TickLoader
from grpo_lightning.types import MinibatchCounts, Rewards, Rollout, SamplingParams


class GRPOModule(CheckedSettings):
    """Trains a policy by Group Relative Policy Optimization (DeepSeekMath, https://arxiv.org/abs/2402.03300).

    An iteration draws `group_size` completions of `prompts_per_iteration` prompts, scores them with the Trainer's
    reward callbacks, and makes `num_epochs` x `num_minibatches` optimizer steps on them.

    Args:
        policy: Where the policy comes from.
        lora: What of it is trained; None for all weights.
        gradient_checkpointing: Whether the backward pass computes each layer again, to keep one's activations alone.
        compile: torch.compile for the blocks of the update; None for none.
        objective: What is maximised.
        sampling: How completions are drawn.
        optimizer: Built from the policy's parameters.
        prompts_per_iteration: Prompts of an iteration, over all ranks.
        group_size: G, completions per prompt, >= 2.
        num_epochs: The paper's mu: how often an iteration's completions are learned from.
        num_minibatches: Optimizer steps per epoch; each learns from an equal share of the prompts.
        engine: Draws the completions; None for the in-process engine.
        draw_ahead: Whether the next iteration's completions are drawn while this one is learned from, which makes them
            one iteration old: the objective needs a correction for that, and the engine processors of its own.
        groups: Which groups are learned from; None for all.
        schedule: Of the learning rate; None for constant.
        evaluation: How held-out prompts are judged; None for greedy accuracy alone.
        layout: How completions share a training forward; None for `SharedPrefix`. It changes time and memory alone.
        max_tokens_per_microbatch: Largest micro-batch, in tokens as laid out, that is computed at once; a larger one is
            cut into pieces, computed again in the backward pass, or under fsdp2 and deepspeed_3 learned from one by
            one. A sequence is never cut: one beyond the limit is computed by itself. None for no limit.
        max_failure_rate: Largest share of an iteration's completions that a reward may fail on.
        seed: Of every random number of the run.

    Raises:
        ConfigurationError: A setting is out of its range.
    """

    iteration: int = 0
    """The iteration under way; between two iterations, the next one."""
    rollout: Rollout | None = None
    """This rank's completions drawn last; `rewards` and `advantages_B` (the mean over their tokens) are theirs."""
    rewards: Rewards | None = None
    advantages_B: Tensor | None = None
    outcomes: Sequence[GroupOutcome] = ()
    """Of the groups drawn since the last update, over all ranks."""
    experience: Experience | None = None
    """What the updates learn from; None where the next rollout is due."""
    tokens_generated: int = 0
    tokens_trained: int = 0
    """Over all ranks; a token counts once per epoch."""

    def __init__(
        self,
        policy: PolicySource,
        objective: Objective,
        sampling: SamplingParams,
        optimizer: OptimizerCallable,
        prompts_per_iteration: int,
        group_size: int,
        num_epochs: int = 1,
        num_minibatches: int = 1,
        engine: RolloutEngine | None = None,
        draw_ahead: bool = False,
        groups: GroupFilter | None = None,
        schedule: Schedule | None = None,
        evaluation: Evaluation | None = None,
        layout: Layout | None = None,
        max_tokens_per_microbatch: int | None = None,
        max_failure_rate: float = 0.1,
        lora: LoRA | None = None,
        gradient_checkpointing: bool = False,
        compile: Compile | None = None,  # noqa: A002 - the name that everyone knows
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # `check_weights` compares what must agree
        self.source, self.lora, self.compilation = policy, lora, compile
        self.gradient_checkpointing = gradient_checkpointing
        self.objective, self.seed = objective, seed
        self.coefficients = self.configured_coefficients = objective.coefficients
        self.sampling, self.make_optimizer = sampling, optimizer
        self.shape = IterationShape(
            prompts_per_iteration=prompts_per_iteration,
            group_size=group_size,
            num_epochs=num_epochs,
            num_minibatches=num_minibatches,
        )
        self.num_updates = self.shape.num_updates
        self.engine = engine or InProcessEngine()
        self.draw_ahead = draw_ahead
        self.groups = groups or KeepAll()
        self.schedule = schedule or Schedule()
        self.evaluation = evaluation or Evaluation()
        self.layout = layout or SharedPrefix()
        self.max_tokens_per_microbatch, self.max_failure_rate = max_tokens_per_microbatch, max_failure_rate
        check_configuration(objective, sampling, self.shape, max_tokens_per_microbatch, max_failure_rate)
        if draw_ahead:
            check_draw_ahead(self.engine, self.groups, objective)

        self.seconds_by_phase: dict[str, float] = {}
        self.held_out = EvaluationMetrics(self.evaluation)
        self._statistics = UpdateStatistics()
        self._update_metrics: dict[str, float] = {}
        self._has_stepped = False
        self._boundary = Boundary()
        self._resumed: dict[str, Any] | None = None

    # The algorithm

    def training_step(self, tick: Tick, batch_idx: int) -> Tensor:  # noqa: ARG002 - Lightning's signature
        """One micro-batch of one update; the first of an iteration draws and scores its completions."""
        if tick.starts_iteration:
            rollout = self.next_rollout()
            rewards = self.score(rollout)
            groups = self.select(rollout, rewards)
            self.experience = self.prepare(groups)
        with self.phase("update"):
            return self.loss(tick)

    def score(self, rollout: Rollout) -> Rewards:
        """Ask every reward about every completion; stop where a reward is broken."""
        with self.phase("score"):
            of_rollout = (rollout.completion_prompts, rollout.completions)
            ask = partial(score_rollout, self.reward_callbacks, *of_rollout)
            rewards = self.stopping.unless_stopped(ask, can_break_off=True)
            num_failed = self._sum_over_ranks([*rewards.failed_BK.sum(dim=0).tolist(), len(rollout.completions)])
            check_failure_rate(self.reward_callbacks, num_failed[:-1], num_failed[-1], self.max_failure_rate)
            return rewards

    def select(self, rollout: Rollout, rewards: Rewards) -> Selection:
        """Settle which groups the iteration looks at: those drawn, or with others in the place of some."""
        selection = self._refill.select(ScoredRollout(rollout, rewards))
        self.outcomes = selection.outcomes
        return selection

    def prepare(self, selection: Selection) -> Experience:
        """Samples, global counts, the log-probabilities that the updates are measured against, and advantages."""
        with self.phase("prepare"):
            self.rollout, self.rewards = rollout, rewards = selection.selected
            groups = scored_groups(rollout, rewards).kept_by(self.groups.keep)
            learned_B = groups.valid_PG.flatten() & self.objective.keeps(rollout.is_truncated_B)
            minibatches = cut_into_minibatches(rollout, learned_B, self.shape)
            metrics = rollout_metrics(
                *selection.drawn,
                self._gather,
                self.evaluation.threshold,
                selection.num_rounds,
                version=self.trainer.global_step,
            )
            experience = Experience.build(
                iteration=self.iteration,
                minibatches=minibatches,
                counts=global_counts(minibatches, self._sum_over_ranks),
                metrics=metrics,
                accumulate_grad_batches=self.trainer.accumulate_grad_batches,
                layout=self.layout,
            )
            self.tokens_generated += int(metrics["completion/tokens"])
            experience, self.advantages_B = self._preparation.fill_in(experience, groups, rollout, rewards)
            learning = learning_metrics(self.advantages_B, learned_B, self._gather)
            return replace(experience, metrics={**metrics, **learning})

    def loss(self, tick: Tick) -> Tensor:
        """This micro-batch's share of the loss of its minibatch."""
        assert self.policy is not None
        assert self.experience is not None, "a resumed run has its experience, a new one has just drawn it"
        assert self.experience.iteration == self.iteration, "the loader and the experience disagree"
        if tick.starts_update:
            self.trainer.optimizers[0].zero_grad()
        counts = self.experience.counts_of(tick.update)
        pieces = self._forward.pieces(self.experience, tick.update, tick.microbatch)
        score = partial(self.policy, entropy_gradient=self.objective.needs_entropy_gradient)
        objective_loss = partial(self.objective.loss, counts=counts, coefficients=self.coefficients)
        loss = torch.zeros((), device=self.device)
        for output in self._forward.losses(score, pieces, objective_loss):
            self._statistics.add(output)
            loss = loss + output.loss
        if tick.ends_update:
            self._log_update(self.experience.metrics, counts)
        return self.undivided(loss)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, unless every group was dropped: an optimizer must not move on momentum alone."""
        loss = optimizer_closure()
        assert self.experience is not None
        self._has_stepped = self.experience.counts_of(self._tick.update).tokens > 0
        if self._has_stepped:
            super().optimizer_step(epoch, batch_idx, optimizer, lambda: loss)
        else:
            self.placement.discard_gradients()
        if self._tick.ends_iteration:
            self.iteration += 1
            self.experience = None
        self.announce_weights(self.trainer.global_step + 1)
        tell_controllers(self.trainer, self, self._update_metrics)
        self.outcomes = ()
        self._boundary.mark(self)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Nothing: `loss` forgets the last update's gradient itself, since it may already begin the next one."""

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:  # noqa: ARG002 - Lightning's signature
        """The schedule counts the steps that were made: a skipped update leaves it where it is."""
        if self._has_stepped:
            scheduler.step()

    @property
    def _forward(self) -> Forward:
        return Forward(
            layout=self.layout,
            temperature=self.sampling.temperature,
            max_tokens=self.max_tokens_per_microbatch,
            device=self.device,
            in_step=self.in_step,
        )

    @property
    def _refill(self) -> Refill:
        return Refill(
            groups=self.groups,
            num_prompts=self.shape.prompts_per_iteration,
            num_minibatches=self.shape.num_minibatches,
            threshold=self.evaluation.threshold,
            rank=self.global_rank,
            num_ranks=self.trainer.world_size,
            gather=self._gather,
            exchange=partial(exchange_over_ranks, num_ranks=self.trainer.world_size),
            draw=self._draw_others,
        )

    def _draw_others(self, drawn: set[int], first_slot: int) -> ScoredRollout | None:
        """A further round of an iteration; None where fewer prompts are left than it has."""
        if self.prompts.num_others(drawn) < self.shape.prompts_per_iteration:
            return None
        prompts = self.prompts.take_others(self.shape.prompts_per_iteration, than=drawn)
        rollout = self.generate(prompts, first_slot=first_slot)
        return ScoredRollout(rollout, self.score(rollout))

    @property
    def _preparation(self) -> Preparation:
        assert self.policy is not None
        return Preparation(
            objective=self.objective,
            policy=self.policy,
            reference=self.reference,
            forward=self._forward,
            num_updates=self.num_updates,
            coefficients=self.coefficients,
            gather=self._gather,
        )

    def _log_update(self, metrics: dict[str, float], counts: MinibatchCounts) -> None:
        """Log the update's statistics beside the iteration's metrics."""
        means = self._update_metrics = self._statistics.take(self._gather)
        self.tokens_trained += counts.tokens
        if not counts.tokens:
            rank_zero_info(f"Iteration {self.iteration}: no group has anything to learn from; the update is skipped.")
        strengths = self.objective.describe(self.coefficients)
        log_metrics(self.trainer, {**metrics, **means, **strengths, "iteration": float(self.iteration)})

    # What Lightning asks for

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer: loaded first and alone, since the data are checked before any weights are read."""
        return self.source.load_tokenizer()

    def setup(self, stage: str) -> None:
        """Check what only the Trainer knows, before the model is loaded."""
        self.reward_callbacks = self.check_parts(self.trainer)
        if stage == "fit":
            check_trainer(self.trainer, self.shape)
        self.take_checkpoints()

    def configure_model(self) -> None:
        """Load the policy; copy the reference from it, where the objective needs one."""
        if self.policy is not None:
            return
        policy = self.place(self.recipe, with_reference=self.trainer.training and self.objective.needs_reference)
        self.layout = usable_layout(self.layout, lambda: policy.follows_segments)
        self.say_what_is_gathered()
        self.engine.setup(policy.model, self.tokenizer, policy.eos_token_ids)
        self.announce_weights(0)

    def configure_optimizers(self) -> Any:
        """The optimizer over the policy's trainable weights, and its schedule by optimizer steps."""
        assert self.policy is not None
        optimizer = self.make_optimizer([p for p in self.policy.parameters() if p.requires_grad])
        scheduler = self.schedule.scheduler(optimizer, self.trainer.estimated_stepping_batches)
        self._configured = settings(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_loader(self, datamodule: PromptDataModule) -> TickLoader:
        """The loop's ticks; the prompts come from a stream that the module pulls from."""
        loader = epoch_of(self.trainer, self.shape, datamodule.training_prompts)
        check_alignment(self.trainer, loader)
        prompts = overfitted(self.trainer, loader, self.shape, datamodule.training_prompts)
        warn_of_long_sequences(self.max_tokens_per_microbatch, prompts, self.sampling.max_new_tokens)
        self.prompts = PromptStream(prompts, seed=self.seed)
        if self._resumed is not None and self._resumed["stream"] is not None:
            self.prompts.load_state_dict(self._resumed["stream"])
            ranks = {"rank": self.global_rank, "world_size": self.trainer.world_size}
            self.ahead = rollout_ahead(self, self._resumed, self._iteration_settings(), **ranks)
        return loader

    def on_train_start(self) -> None:
        """What the configuration says wins over what a checkpoint restored, and is said."""
        super().on_train_start()
        optimizer, scheduler = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler
        for difference in apply_settings(optimizer, scheduler, self._configured):  # type: ignore[arg-type]
            rank_zero_info(f"Resumed with model.optimizer's {difference}.")
        self.announce_weights(self.trainer.global_step)
        self._boundary.mark(self)
        self._boundary.loops = deepcopy(self.trainer.fit_loop.state_dict())

    def on_train_batch_start(self, batch: Tick, batch_idx: int) -> None:  # noqa: ARG002
        """An accumulation window is open until the optimizer has stepped."""
        self._tick = batch
        self._boundary.is_current = False
        self.stopping.check()

    def on_train_batch_end(self, outputs: Any, batch: Tick, batch_idx: int) -> None:  # noqa: ARG002
        """Remember the loops' state at the window's end, for a save that falls inside the next one."""
        if batch.ends_update:
            self._boundary.loops = deepcopy(self.trainer.fit_loop.state_dict())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the run's own state, as of the last window's end."""
        settings, of_iteration = self._resume_settings(), self._iteration_settings()
        self._boundary.write(checkpoint, settings, of_iteration, self.base_checksum)
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits, and take up its state."""
        state = own_state(checkpoint)
        saved = weights_of(checkpoint, with_reference=self.reference is not None)
        self.has_moved_reference = any(name.startswith("reference.") for name in saved)
        check_weights(saved, self.weight_shapes)
        if not self.has_moved_reference:
            check_base(state, self.base_checksum, is_adapter=self.lora is not None)
        if not self.trainer.training:
            return
        settings, of_iteration = self._resume_settings(), self._iteration_settings()
        take_up(self, state, settings, of_iteration, rank=self.global_rank, world_size=self.trainer.world_size)
        if self.experience is not None:
            self.experience = self._forward.agreed(self.experience)
        self._resumed = state

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time a stage, and tell the callbacks that show it."""
        return timed_phase(name, self.seconds_by_phase, trainer=self.trainer, module=self)

    def _iteration_settings(self) -> dict[str, str]:
        return described("model.objective", self.objective) | described("model.sampling", self.sampling)

    def _resume_settings(self) -> dict[str, int]:
        accumulate = self.trainer.accumulate_grad_batches
        return {**self.shape.settings, "model.seed": self.seed, "trainer.accumulate_grad_batches": accumulate}

"""GRPO as a LightningModule: the order of the stages, and nothing else."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from transformers import PreTrainedTokenizerBase

from grpo_lightning.batching import Experience, Sample, chunks, padded
from grpo_lightning.batching.experience import loss_batch
from grpo_lightning.checkpointing import PolicyExport, write_whole
from grpo_lightning.data import PromptDataModule, PromptStream
from grpo_lightning.evaluation import Evaluation, EvaluationMetrics
from grpo_lightning.functional.advantages import has_zero_variance
from grpo_lightning.groups import GroupFilter, KeepAll
from grpo_lightning.objective import Objective
from grpo_lightning.optim import Schedule, apply_settings, settings
from grpo_lightning.policy import Policy, PolicySource, frozen_copy
from grpo_lightning.resuming import KEY, Boundary, check_settings, check_weights
from grpo_lightning.rewards import check_failure_rate, find_rewards, score_rollout
from grpo_lightning.rollout import InProcessEngine, RolloutEngine
from grpo_lightning.ticks import Tick, TickLoader
from grpo_lightning.types import (
    Completion,
    ConfigurationError,
    Coordinates,
    EvaluationPrompt,
    GenerationRequest,
    LossOutput,
    MinibatchCounts,
    Prompt,
    Rewards,
    Rollout,
    SamplingParams,
    Statistic,
    Stream,
    TokenScores,
)


class GRPOModule(LightningModule):
    """Trains a policy by Group Relative Policy Optimization (DeepSeekMath, https://arxiv.org/abs/2402.03300).

    An iteration draws `group_size` completions of `prompts_per_iteration` prompts, scores them with the Trainer's
    reward callbacks, and makes `num_epochs` x `num_minibatches` optimizer steps on them.

    Args:
        policy: Where the policy comes from.
        objective: What is maximised.
        sampling: How completions are drawn.
        optimizer: Built from the policy's parameters.
        prompts_per_iteration: Prompts of an iteration, over all ranks.
        group_size: G, completions per prompt, >= 2.
        num_epochs: The paper's mu: how often an iteration's completions are learned from.
        num_minibatches: Optimizer steps per epoch; each learns from an equal share of the prompts.
        engine: Draws the completions; None for the in-process engine.
        groups: Which groups are learned from; None for all.
        schedule: Of the learning rate; None for constant.
        evaluation: How held-out prompts are judged; None for greedy accuracy alone.
        max_tokens_per_microbatch: Largest micro-batch, in padded tokens, that is computed at once; a larger one is cut
            into pieces that are computed again in the backward pass. None for no limit.
        max_failure_rate: Largest share of an iteration's completions that a reward may fail on.
        seed: Of every random number of the run.
    """

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
        groups: GroupFilter | None = None,
        schedule: Schedule | None = None,
        evaluation: Evaluation | None = None,
        max_tokens_per_microbatch: int | None = None,
        max_failure_rate: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # the reference is not in the checkpoint; `check_weights` compares the rest
        self.source = policy
        self.objective = objective
        self.sampling = sampling
        self.make_optimizer = optimizer
        self.prompts_per_iteration = prompts_per_iteration
        self.group_size = group_size
        self.num_epochs = num_epochs
        self.num_minibatches = num_minibatches
        self.engine = engine or InProcessEngine()
        self.groups = groups or KeepAll()
        self.schedule = schedule or Schedule()
        self.evaluation = evaluation or Evaluation()
        self.max_tokens_per_microbatch = max_tokens_per_microbatch
        self.max_failure_rate = max_failure_rate
        self.seed = seed
        self._check_settings()

        self.policy: Policy | None = None
        self.reference: Policy | None = None
        self.iteration = 0
        self.rollout: Rollout | None = None
        self.rewards: Rewards | None = None
        self.advantages_B: Tensor | None = None
        self.experience: Experience | None = None
        self.seconds_by_phase: dict[str, float] = {}
        self.tokens_generated = 0
        self.tokens_trained = 0
        self.held_out = EvaluationMetrics(self.evaluation)
        self._boundary = Boundary()
        self._resumed: dict[str, Any] | None = None
        self._statistics: dict[str, Statistic] = {}
        self._has_stepped = False

    # The algorithm

    def training_step(self, tick: Tick, batch_idx: int) -> Tensor:  # noqa: ARG002 - Lightning's signature
        """One micro-batch of one update; the first of an iteration draws and scores its completions."""
        if tick.starts_iteration:
            rollout = self.generate(self.prompts.take(self.prompts_per_iteration))
            rewards = self.score(rollout)
            self.experience = self.prepare(rollout, rewards)
        with self.phase("update"):
            return self.loss(tick)

    def generate(self, prompts: Sequence[Prompt]) -> Rollout:
        """Draw a group of completions of each of this rank's prompts."""
        with self.phase("generate"):
            slots = range(self.global_rank, len(prompts), self.trainer.world_size)
            requests = [
                GenerationRequest(slot=s, token_ids=prompts[s].token_ids, num_completions=self.group_size)
                for s in slots
            ]
            completions = self.engine.generate(requests, self.sampling, self._coordinates(Stream.TRAINING))
            return Rollout(
                iteration=self.iteration,
                slots=tuple(slots),
                prompts=tuple(prompts[s] for s in slots),
                completions=tuple(completions),
            )

    def score(self, rollout: Rollout) -> Rewards:
        """Ask every reward about every completion; stop where a reward is broken."""
        with self.phase("score"):
            rewards = score_rollout(self.reward_callbacks, rollout.completion_prompts, rollout.completions)
            num_failed = self._summed([*rewards.failed_BK.sum(dim=0).tolist(), len(rollout.completions)])
            check_failure_rate(self.reward_callbacks, num_failed[:-1], num_failed[-1], self.max_failure_rate)
            return rewards

    def prepare(self, rollout: Rollout, rewards: Rewards) -> Experience:
        """Advantages, masks, global counts, and the log-probabilities that the updates are measured against."""
        with self.phase("prepare"):
            shape = (len(rollout.prompts), self.group_size)
            rewards_PG, valid_PG = rewards.totals_B.view(shape), rewards.valid_B.view(shape)
            learned_PG = valid_PG & self.groups.keep(rewards_PG, valid_PG)[:, None]
            self.advantages_B = self.objective.advantage(rewards_PG, valid_PG).flatten()
            self.rollout, self.rewards = rollout, rewards

            minibatches = self._minibatches(rollout, self.advantages_B, learned_PG.flatten())
            experience = Experience.build(
                iteration=self.iteration,
                minibatches=minibatches,
                counts=self._global_counts(minibatches),
                metrics=self._rollout_metrics(rollout, rewards, valid_PG),
                accumulate_grad_batches=self.trainer.accumulate_grad_batches,
            )
            self.tokens_generated += int(experience.metrics["completion/tokens"])
            if self.num_updates > 1:
                assert self.policy is not None
                experience = experience.with_logprobs("old_logprobs", self._logprobs(self.policy, experience))
            if self.reference is not None:
                experience = experience.with_logprobs("reference_logprobs", self._logprobs(self.reference, experience))
            return experience

    def loss(self, tick: Tick) -> Tensor:
        """This micro-batch's share of the loss of its minibatch."""
        assert self.experience is not None, "a resumed run has its experience, a new one has just drawn it"
        assert self.experience.iteration == self.iteration, "the loader and the experience disagree"
        minibatch = tick.update % self.num_minibatches
        counts = self.experience.counts[minibatch]
        samples = self.experience.microbatch(minibatch, tick.microbatch)
        loss = self._unused_forward() if not samples else torch.zeros((), device=self.device)
        for chunk in self._chunks(samples):
            loss = loss + self._tally(self._chunk_loss(chunk, counts, recompute=len(chunk) < len(samples)))
        if tick.ends_update:
            self._log_update(counts)
        return loss * self._undone_division

    # One update

    def _chunk_loss(self, samples: Sequence[Sample], counts: MinibatchCounts, *, recompute: bool) -> LossOutput:
        assert self.policy is not None
        forward = padded([s.prompt_ids for s in samples], [s.completion_ids for s in samples], self.device)
        batch = loss_batch(samples, self.device)

        policy = self.policy

        def compute() -> LossOutput:
            return self.objective.loss(policy(forward, self.sampling.temperature), batch, counts)

        if not recompute:
            return compute()
        output: LossOutput = recompute_in_backward(compute, use_reentrant=False)
        return output

    def _chunks(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        pieces = chunks(range(len(samples)), [s.length for s in samples], self.max_tokens_per_microbatch)
        return [[samples[i] for i in piece] for piece in pieces if piece]

    def _unused_forward(self) -> Tensor:
        """Zero that depends on every weight: a rank without samples still takes part in the strategy's collectives."""
        assert self.policy is not None
        one = torch.zeros(1, dtype=torch.long)
        scores: TokenScores = self.policy(padded([one], [one], self.device), self.sampling.temperature)
        return scores.logprobs_BT.sum() * 0.0

    @property
    def _undone_division(self) -> float:
        """Undoes, in this one place, what divides the loss: the accumulation, and the average over ranks."""
        return float(self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def _tally(self, output: LossOutput) -> Tensor:
        for name, statistic in output.statistics.items():
            so_far = self._statistics.get(name, Statistic(statistic.sum * 0, statistic.count * 0))
            self._statistics[name] = Statistic(so_far.sum + statistic.sum, so_far.count + statistic.count)
        return output.loss

    def _log_update(self, counts: MinibatchCounts) -> None:
        """Log the update's statistics, reduced as sums and counts over ranks, beside the iteration's."""
        assert self.experience is not None
        names = ["policy/entropy", "policy/clip_fraction", "policy/ratio", "policy/kl"]
        names += sorted(set(self._statistics) - set(names))
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        local = [self._statistics.get(name, Statistic(zero, zero)) for name in names]
        sums = self._summed([float(x) for statistic in local for x in statistic])
        means = {n: sums[2 * i] / sums[2 * i + 1] for i, n in enumerate(names) if sums[2 * i + 1]}
        self._statistics = {}
        self.tokens_trained += counts.tokens
        if not counts.tokens:
            rank_zero_info(f"Iteration {self.iteration}: no group has anything to learn from; the update is skipped.")
        self.log_dict({**self.experience.metrics, **means, "iteration": float(self.iteration)}, batch_size=1)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, unless every group was dropped: an optimizer must not move on momentum alone."""
        loss = optimizer_closure()
        tick = self._tick
        assert self.experience is not None
        self._has_stepped = self.experience.counts[tick.update % self.num_minibatches].tokens > 0
        if self._has_stepped:
            super().optimizer_step(epoch, batch_idx, optimizer, lambda: loss)
        if tick.ends_iteration:
            self.iteration += 1
            self.experience = None
        self.engine.update_weights((), self.trainer.global_step + 1)
        self._mark_boundary()

    # One rollout

    def _minibatches(self, rollout: Rollout, advantages_B: Tensor, learned_B: Tensor) -> list[list[Sample]]:
        """Whole groups in global order: which minibatch a prompt falls into does not depend on the ranks."""
        minibatches: list[list[Sample]] = [[] for _ in range(self.num_minibatches)]
        prompts_per_minibatch = self.prompts_per_iteration // self.num_minibatches
        for b, completion in enumerate(rollout.completions):
            p, index = divmod(b, self.group_size)
            tokens = torch.tensor(completion.token_ids)
            mask = torch.ones(len(tokens), dtype=torch.bool)
            if completion.loss_mask is not None:
                mask = torch.tensor(completion.loss_mask)
            if learned_B[b] and mask.any():
                sample = Sample(
                    slot=rollout.slots[p],
                    index=index,
                    prompt_ids=torch.tensor(rollout.prompts[p].token_ids),
                    completion_ids=tokens,
                    loss_mask=mask,
                    advantage=float(advantages_B[b]),
                )
                minibatches[sample.slot // prompts_per_minibatch].append(sample)
        return minibatches

    def _global_counts(self, minibatches: Sequence[Sequence[Sample]]) -> list[MinibatchCounts]:
        local = [
            (sum(int(s.loss_mask.sum()) for s in samples), len(samples), len({s.slot for s in samples}))
            for samples in minibatches
        ]
        total = self._summed([float(n) for counts in local for n in counts])
        return [MinibatchCounts(*map(int, total[3 * m : 3 * m + 3])) for m in range(len(minibatches))]

    @torch.no_grad()
    def _logprobs(self, policy: Policy, experience: Experience) -> list[list[Tensor]]:
        """Log-probabilities of every sample's tokens, through the same micro-batches as the updates."""
        result: list[list[Tensor]] = []
        for m, samples in enumerate(experience.minibatches):
            by_sample: dict[tuple[int, int], Tensor] = {}
            for microbatch in range(len(experience.bins[m])):
                for chunk in self._chunks(experience.microbatch(m, microbatch)):
                    forward = padded([s.prompt_ids for s in chunk], [s.completion_ids for s in chunk], self.device)
                    logprobs_BT = policy(forward, self.sampling.temperature).logprobs_BT.cpu()
                    for s, row in zip(chunk, logprobs_BT, strict=True):
                        by_sample[s.slot, s.index] = row[: len(s.completion_ids)].clone()
            result.append([by_sample[s.slot, s.index] for s in samples])
        return result

    def _rollout_metrics(self, rollout: Rollout, rewards: Rewards, valid_PG: Tensor) -> dict[str, float]:
        """What the iteration looked like, over all ranks: every mean is a sum over a count."""
        totals_B = rewards.totals_B[rewards.valid_B]
        lengths = [float(len(c.token_ids)) for c in rollout.completions]
        rewards_PG = rewards.totals_B.view(valid_PG.shape)
        varies_P = ~has_zero_variance(rewards_PG, valid_PG)
        pairs: dict[str, tuple[float, float]] = {
            "reward/mean": (float(totals_B.sum()), len(totals_B)),
            "reward/square": (float(totals_B.square().sum()), len(totals_B)),
            "reward/solve_rate": (float((totals_B >= self.evaluation.threshold).sum()), len(rollout.completions)),
            "reward/groups_with_signal": (float(varies_P.sum()), len(varies_P)),
            "reward/failure_ratio": (float(rewards.failed_BK.any(dim=1).sum()), len(rollout.completions)),
            "completion/length_mean": (sum(lengths), len(lengths)),
            "completion/truncation_ratio": (sum(c.is_truncated for c in rollout.completions), len(lengths)),
        }
        for k, name in enumerate(rewards.names):
            column = rewards.values_BK[:, k]
            known = column[~column.isnan()]
            pairs[f"reward/{name}/mean"] = (float(known.sum()), len(known))
        sums = self._summed([x for pair in pairs.values() for x in pair])
        means = {name: sums[2 * i] / max(sums[2 * i + 1], 1.0) for i, name in enumerate(pairs)}
        variance = means.pop("reward/square") - means["reward/mean"] ** 2
        tokens = sums[2 * list(pairs).index("completion/length_mean")]
        return {**means, "reward/std": max(variance, 0.0) ** 0.5, "completion/tokens": tokens}

    # Evaluation

    def validation_step(self, batch: list[EvaluationPrompt], batch_idx: int) -> None:  # noqa: ARG002
        """Complete and judge some held-out prompts."""
        self._judge(batch, Stream.VALIDATION)

    def test_step(self, batch: list[EvaluationPrompt], batch_idx: int) -> None:  # noqa: ARG002
        """As `validation_step`, with random numbers of its own."""
        self._judge(batch, Stream.TEST)

    def predict_step(self, batch: list[EvaluationPrompt], batch_idx: int) -> list[Completion]:  # noqa: ARG002
        """The completions of some prompts, drawn as `model.sampling` says."""
        requests = [GenerationRequest(slot=s, token_ids=p.token_ids, num_completions=1) for s, p in batch]
        return self.engine.generate(requests, self.sampling, self._coordinates(Stream.PREDICT, 0))

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
        result = {name: float(value) for name, value in self.held_out.compute().items()}
        self.held_out.reset()
        return result

    def _judge(self, batch: list[EvaluationPrompt], stream: Stream) -> None:
        with self.phase("evaluate"):
            self.held_out.evaluate(
                batch,
                engine=self.engine,
                sampling=self.sampling,
                coordinates=self._coordinates(stream, 0),
                score=lambda prompts, completions: score_rollout(self.reward_callbacks, prompts, completions),
                rewards=self.reward_callbacks,
            )

    def _log_held_out(self, stage: str) -> None:
        self.log_dict({f"{stage}/{name}": value for name, value in self.held_out.compute().items()}, batch_size=1)
        self.held_out.reset()

    # What Lightning asks for

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer: loaded first and alone, since the data are checked before any weights are read."""
        return self.source.load_tokenizer()

    def setup(self, stage: str) -> None:
        """Check what only the Trainer knows, before the model is loaded."""
        self.reward_callbacks = find_rewards(self.trainer.callbacks)  # type: ignore[attr-defined]
        self.evaluation.check_rewards([reward.name for reward in self.reward_callbacks])
        if stage == "fit":
            self._check_trainer()
            io = self.trainer.strategy.checkpoint_io
            self.trainer.strategy.checkpoint_io = PolicyExport(io, self.export_policy)

    def configure_model(self) -> None:
        """Load the policy; copy the reference from it, where the objective needs one."""
        if self.policy is not None:
            return
        model = self.source.load_model(seed=self.seed)
        self.policy = Policy(model, self.tokenizer)
        if self.trainer.training and self.objective.needs_reference:
            self.reference = frozen_copy(self.policy, model.state_dict())
        self.engine.setup(model, self.tokenizer, self.policy.eos_token_ids)

    def configure_optimizers(self) -> Any:
        """The optimizer over the policy's trainable weights, and its schedule by optimizer steps."""
        assert self.policy is not None
        optimizer = self.make_optimizer([p for p in self.policy.parameters() if p.requires_grad])
        scheduler = self.schedule.scheduler(optimizer, self.trainer.estimated_stepping_batches)
        self._configured = settings(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_loader(self, datamodule: PromptDataModule) -> TickLoader:
        """The loop's ticks; the prompts come from a stream that the module pulls from."""
        self.prompts = PromptStream(datamodule.training_prompts, seed=self.seed)
        if self._resumed is not None and self._resumed["stream"] is not None:
            self.prompts.load_state_dict(self._resumed["stream"])
        loader = TickLoader(
            num_iterations=-(-len(datamodule.training_prompts) // self.prompts_per_iteration),
            num_updates=self.num_updates,
            num_microbatches=self.trainer.accumulate_grad_batches,
        )
        self._check_alignment(loader)
        return loader

    def on_train_start(self) -> None:
        """What the configuration says wins over what a checkpoint restored, and is said."""
        optimizer, scheduler = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler
        for difference in apply_settings(optimizer, scheduler, self._configured):  # type: ignore[arg-type]
            rank_zero_info(f"Resumed with model.optimizer's {difference}.")
        self._mark_boundary()
        self._boundary.loops = deepcopy(self.trainer.fit_loop.state_dict())

    def on_train_batch_start(self, batch: Tick, batch_idx: int) -> None:  # noqa: ARG002
        """An accumulation window is open until the optimizer has stepped."""
        self._tick = batch
        self._boundary.is_current = False

    def on_train_batch_end(self, outputs: Any, batch: Tick, batch_idx: int) -> None:  # noqa: ARG002
        """Remember the loops' state at the window's end, for a save that falls inside the next one."""
        if batch.ends_update:
            self._boundary.loops = deepcopy(self.trainer.fit_loop.state_dict())

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The policy's weights; the reference is the policy that the run began with, and is loaded from there."""
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if name.startswith("policy.")}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the run's own state, as of the last window's end."""
        self._boundary.write(checkpoint, self._resume_settings())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits, and take up its state."""
        if KEY not in checkpoint:
            raise ConfigurationError("--ckpt_path: the checkpoint was not written by a GRPO run of this package.")
        check_weights(checkpoint["state_dict"], self.state_dict())
        if not self.trainer.training:
            return
        state = checkpoint[KEY]
        check_settings(state, self._resume_settings())
        self.iteration = state["iteration"]
        self.tokens_generated, self.tokens_trained = state["tokens_generated"], state["tokens_trained"]
        self.seconds_by_phase = dict(state["seconds_by_phase"])
        if state["experience"] is not None:
            self.experience = Experience.from_state_dict(
                state["experience"],
                rank=self.global_rank,
                world_size=self.trainer.world_size,
                accumulate_grad_batches=self.trainer.accumulate_grad_batches,
            )
        self._resumed = state

    def teardown(self, stage: str) -> None:  # noqa: ARG002
        """Give back what the engine holds."""
        self.engine.close()

    def export_policy(self, folder: Path) -> None:
        """Write a folder that transformers alone loads. On one rank: the weights are not sharded here."""
        assert self.policy is not None
        write_whole(Path(folder), self.policy.save)

    # Small print

    @property
    def num_updates(self) -> int:
        """Optimizer steps of an iteration."""
        return self.num_epochs * self.num_minibatches

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a stage, and tell the callbacks that show it."""
        watchers = [c for c in self.trainer.callbacks if hasattr(c, "on_phase")]  # type: ignore[attr-defined]
        for callback in watchers:
            callback.on_phase(self.trainer, self, name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds_by_phase[name] = self.seconds_by_phase.get(name, 0.0) + time.perf_counter() - start
            for callback in watchers:
                callback.on_phase(self.trainer, self, None)

    def _coordinates(self, stream: Stream, iteration: int | None = None) -> Coordinates:
        return Coordinates(seed=self.seed, stream=stream, iteration=self.iteration if iteration is None else iteration)

    def _summed(self, values: Sequence[float]) -> list[float]:
        """The values summed over all ranks."""
        if self.trainer.world_size == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def _mark_boundary(self) -> None:
        self._boundary = Boundary(
            iteration=self.iteration,
            tokens_generated=self.tokens_generated,
            tokens_trained=self.tokens_trained,
            seconds_by_phase=dict(self.seconds_by_phase),
            stream=self.prompts.state_dict(),
            experience=self.experience,
            loops=self._boundary.loops,
        )

    def _resume_settings(self) -> dict[str, int]:
        return {
            "model.prompts_per_iteration": self.prompts_per_iteration,
            "model.group_size": self.group_size,
            "model.num_epochs": self.num_epochs,
            "model.num_minibatches": self.num_minibatches,
            "model.seed": self.seed,
            "trainer.accumulate_grad_batches": self.trainer.accumulate_grad_batches,
        }

    def _check_settings(self) -> None:
        positive = ("prompts_per_iteration", "num_epochs", "num_minibatches")
        for name, least in (*((name, 1) for name in positive), ("group_size", 2)):
            if getattr(self, name) < least:
                raise ConfigurationError(f"model.{name} must be >= {least}, got {getattr(self, name)}.")
        if self.sampling.top_p != 1 or self.sampling.top_k is not None:
            raise ConfigurationError(
                "model.sampling: training draws from the full distribution, so top_p must be 1 and top_k null "
                f"(got {self.sampling.top_p} and {self.sampling.top_k}). For evaluation set model.evaluation.top_p."
            )
        if not self.sampling.temperature > 0:
            raise ConfigurationError(f"model.sampling.temperature must be > 0, got {self.sampling.temperature}.")
        if not self.sampling.max_new_tokens >= 1:
            raise ConfigurationError(f"model.sampling.max_new_tokens must be >= 1, got {self.sampling.max_new_tokens}.")
        if self.max_tokens_per_microbatch is not None and self.max_tokens_per_microbatch < 1:
            raise ConfigurationError(
                f"model.max_tokens_per_microbatch must be >= 1 or null, got {self.max_tokens_per_microbatch}."
            )

    def _check_trainer(self) -> None:
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks):
            raise ConfigurationError(
                "trainer.callbacks: GradientAccumulationScheduler is not supported: a minibatch is cut into "
                "micro-batches before its first backward. Set trainer.accumulate_grad_batches."
            )
        divisor = self.num_minibatches * self.trainer.world_size
        if self.prompts_per_iteration % divisor:
            raise ConfigurationError(
                f"model.prompts_per_iteration must be divisible by model.num_minibatches x number of ranks = "
                f"{self.num_minibatches} x {self.trainer.world_size} = {divisor}, got {self.prompts_per_iteration}."
            )
        completions = self.prompts_per_iteration // divisor * self.group_size
        if self.trainer.accumulate_grad_batches > completions:
            raise ConfigurationError(
                f"trainer.accumulate_grad_batches must be at most the {completions} completions of a minibatch on each "
                f"rank, got {self.trainer.accumulate_grad_batches}."
            )

    def _check_alignment(self, loader: TickLoader) -> None:
        limit = self.trainer.limit_train_batches
        if isinstance(limit, int) and limit % loader.ticks_per_iteration:
            raise ConfigurationError(
                f"trainer.limit_train_batches must be a multiple of the {loader.ticks_per_iteration} micro-batches of "
                f"an iteration, got {limit}."
            )
        interval = self.trainer.val_check_interval
        if isinstance(interval, int) and interval % self.trainer.accumulate_grad_batches:
            raise ConfigurationError(
                "trainer.val_check_interval counts micro-batches and must be a multiple of "
                f"trainer.accumulate_grad_batches = {self.trainer.accumulate_grad_batches}, got {interval}."
            )

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:  # noqa: ARG002 - Lightning's signature
        """The schedule counts the steps that were made: a skipped update leaves it where it is."""
        if self._has_stepped:
            scheduler.step()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:  # noqa: ARG002
        """Free the gradients."""
        optimizer.zero_grad()

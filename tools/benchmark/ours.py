"""The worker of this framework: `GRPOModule` under Lightning's `Trainer`, through their public interface alone."""

import argparse
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, __version__

from grpo_lightning import GRPOModule
from grpo_lightning.data import PromptDataModule
from grpo_lightning.objective import K3, Clipped, GroupMean, GroupStd, KLInLoss, Objective, TokenMean, TokenRatio
from grpo_lightning.policy import PolicySource, PretrainedPolicy
from grpo_lightning.rewards import RewardCallback
from grpo_lightning.types import Completion, Prompt, SamplingParams
from tools.benchmark import memory
from tools.benchmark.model_folder import prompt_texts, reward_of
from tools.benchmark.protocol import Channel, FinishedError, Hello, Report
from tools.benchmark.rate import matmul_rate
from tools.benchmark.series import POINTS
from tools.benchmark.workloads import WORKLOADS, Workload


class EvenSum(RewardCallback):
    """`reward_of` the tokens of a completion."""

    def __init__(self) -> None:
        super().__init__("even_sum")

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:  # noqa: ARG002
        """One for each completion."""
        return [reward_of(list(completion.token_ids)) for completion in completions]


class RandomPrompts(PromptDataModule):
    """The workload's prompts, enough for eight steps; then they come again."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.texts = prompt_texts(workload, num_prompts=8 * workload.num_prompts)

    def rows(self, split: str) -> list[dict[str, str]]:
        """Of training alone."""
        return [{"prompt": text} for text in self.texts] if split == "train" else []


class Gate(Callback):
    """Holds the training loop before each step until the coordinator wants it, and reports what it cost.

    Args:
        channel: To the coordinator.
        hello: All that is said in the beginning but the number of parameters.
        answers: What to do at other commands, by name; they get the module and the command's argument.
    """

    def __init__(
        self, channel: Channel, hello: partial[Hello], answers: Mapping[str, Callable[[GRPOModule, Any], Any]]
    ) -> None:
        self.channel, self.hello, self.answers = channel, hello, answers
        self.started = 0.0
        self.phases_before: Mapping[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Say that everything is loaded."""
        self.channel.handlers |= {name: partial(answer, pl_module) for name, answer in self.answers.items()}
        self.channel.say(self.hello(num_parameters=sum(p.numel() for p in pl_module.policy.parameters())))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Wait."""
        self.channel.wait_for_step()
        self.phases_before = dict(pl_module.seconds_by_phase)
        self.started = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Report."""
        seconds = time.perf_counter() - self.started
        phases = pl_module.seconds_by_phase
        report = Report(
            seconds=seconds,
            peak_bytes=memory.peak(),
            lengths=_lengths(pl_module.rollout),
            seconds_by_phase={name: phases[name] - self.phases_before.get(name, 0.0) for name in phases},
        )
        self.channel.say(report)


def make_trainer(
    channel: Channel, reward: RewardCallback, answers: Mapping[str, Callable[[GRPOModule, Any], Any]], **settings: Any
) -> Trainer:
    """A quiet trainer behind a gate.

    Args:
        channel: See `Gate`.
        reward: The only one.
        answers: See `Gate`.
        settings: More of the Trainer's.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    hello = partial(Hello, framework=f"grpo_lightning, Lightning {__version__}", base_bytes=memory.current())
    return Trainer(
        accelerator="cpu",
        max_epochs=-1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[reward, Gate(channel, hello, answers)],
        **settings,
    )


def serve(trainer: Trainer, module: GRPOModule, data: PromptDataModule) -> None:
    """Train until the coordinator has had enough."""
    with suppress(FinishedError):
        trainer.fit(module, data)


def make_module(workload: Workload, policy: PolicySource, *, is_fused: bool) -> GRPOModule:
    """The workload as a module.

    Args:
        workload: What a step does.
        policy: The model.
        is_fused: Whether the optimizer is; Lightning clips no gradients of a fused one in mixed precision.
    """
    objective = Objective(
        advantage=GroupMean(),
        scale=GroupStd(ddof=1, epsilon=1e-4),
        ratio=TokenRatio(),
        surrogate=Clipped(clip_low=0.2, clip_high=0.2),
        aggregation=TokenMean(),
        kl=KLInLoss(coefficient=workload.kl_coefficient, estimator=K3()),
    )
    return GRPOModule(
        policy=policy,
        objective=objective,
        sampling=SamplingParams(
            max_new_tokens=workload.max_new_tokens,
            min_new_tokens=0 if workload.is_ragged else workload.max_new_tokens,
        ),
        optimizer=partial(torch.optim.AdamW, lr=1e-6, weight_decay=0.0, fused=is_fused),
        prompts_per_iteration=workload.num_prompts,
        group_size=workload.group_size,
    )


def _rollout(module: GRPOModule, _: None) -> Report:
    """A rollout alone, of the prompts that are next."""
    memory.reset_peak()
    prompts = module.prompts.take(module.shape.prompts_per_iteration)
    start = time.perf_counter()
    rollout = module.generate(prompts)
    return Report(seconds=time.perf_counter() - start, peak_bytes=memory.peak(), lengths=_lengths(rollout))


def _lengths(rollout: Any) -> tuple[int, ...]:
    return tuple(len(completion.token_ids) for completion in rollout.completions)


def main() -> None:
    """Serve until the coordinator has had enough."""
    known = WORKLOADS | POINTS
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("descriptor", type=int)
    parser.add_argument("workload", choices=known)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--reduced", action="store_true")
    parser.add_argument("--precision", default="32-true")
    settings = parser.parse_args()
    workload = known[settings.workload]
    workload = workload.reduced() if settings.reduced else workload
    channel = Channel(settings.descriptor)
    channel.handlers["rate"] = partial(matmul_rate, workload)
    policy = PretrainedPolicy(str(settings.folder))
    module = make_module(workload, policy, is_fused=settings.precision == "32-true")
    _ = module.tokenizer  # loaded now, so that the memory of the process without a model has it
    trainer = make_trainer(channel, EvenSum(), {"rollout": _rollout}, precision=settings.precision)
    serve(trainer, module, RandomPrompts(workload))


if __name__ == "__main__":
    main()

"""Evaluation on held-out prompts: what is drawn, and what is measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from grpo_lightning.functional.evaluation import majority_is_correct, pass_at_k
from grpo_lightning.rewards import RewardCallback
from grpo_lightning.rollout import RolloutEngine
from grpo_lightning.types import (
    Completion,
    ConfigurationError,
    Coordinates,
    EvaluationPrompt,
    GenerationRequest,
    Prompt,
    Rewards,
    SamplingParams,
)

Score = Callable[[Sequence[Prompt], Sequence[Completion]], Rewards]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How held-out prompts are completed and judged.

    Args:
        num_samples: Samples per prompt for pass@k and maj@k, beside the greedy completion; 0 for none.
        temperature: Of the samples.
        top_k: Of the samples; None for all tokens.
        top_p: Of the samples.
        pass_at: The k of pass@k, each at most `num_samples`.
        majority_at: The k of maj@k, each at most `num_samples`.
        correct: The reward that says whether a completion is correct; None for the total of all.
        threshold: Correct is a reward of at least this.
    """

    num_samples: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    pass_at: tuple[int, ...] = ()
    majority_at: tuple[int, ...] = ()
    correct: str | None = None
    threshold: float = 1.0

    def __post_init__(self) -> None:
        for name in ("pass_at", "majority_at"):
            for k in getattr(self, name):
                if not 1 <= k <= self.num_samples:
                    raise ConfigurationError(
                        f"model.evaluation.{name}: {k} is not between 1 and num_samples = {self.num_samples}."
                    )

    def samples(self, sampling: SamplingParams) -> SamplingParams:
        """How the samples are drawn, where training draws with `sampling`."""
        return replace(sampling, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    def is_correct(self, rewards: Rewards) -> Tensor:
        """Bool per completion; a completion that could not be scored is not correct."""
        if self.correct is None:
            return rewards.totals_B.nan_to_num(-torch.inf) >= self.threshold
        if self.correct not in rewards.names:
            raise ConfigurationError(
                f"model.evaluation.correct names no reward: {self.correct!r} is not among {list(rewards.names)}."
            )
        return rewards.values_BK[:, rewards.names.index(self.correct)].nan_to_num(-torch.inf) >= self.threshold


class EvaluationMetrics(nn.Module):
    """The metrics of one evaluation, exact over any number of ranks: sums and counts are reduced, never means."""

    def __init__(self, evaluation: Evaluation) -> None:
        super().__init__()
        self.evaluation = evaluation
        names = ["accuracy", "reward", "length_mean", "truncation_ratio"]
        names += [f"pass@{k}" for k in evaluation.pass_at] + [f"maj@{k}" for k in evaluation.majority_at]
        self.metrics: Mapping[str, MeanMetric] = nn.ModuleDict({name: MeanMetric() for name in names})  # type: ignore[assignment]

    def evaluate(
        self,
        batch: Sequence[EvaluationPrompt],
        *,
        engine: RolloutEngine,
        sampling: SamplingParams,
        coordinates: Coordinates,
        score: Score,
        rewards: Sequence[RewardCallback],
    ) -> list[Completion]:
        """Complete and judge some prompts; returns the greedy completions."""
        prompts = [prompt for _, prompt in batch]
        greedy = engine.generate(_requests(batch, 1), replace(sampling, temperature=0.0), coordinates)
        judged = score(prompts, greedy)
        self._update("accuracy", self.evaluation.is_correct(judged))
        self._update("reward", judged.totals_B[judged.valid_B])
        self._update("length_mean", torch.tensor([float(len(c.token_ids)) for c in greedy]))
        self._update("truncation_ratio", torch.tensor([c.is_truncated for c in greedy]))
        n = self.evaluation.num_samples
        if n:
            samples = engine.generate(_requests(batch, n), self.evaluation.samples(sampling), coordinates)
            self._judge_samples(samples, score([p for p in prompts for _ in range(n)], samples), rewards)
        return greedy

    def compute(self) -> dict[str, Tensor]:
        """Every metric by name, over all ranks."""
        return {name: metric.compute() for name, metric in self.metrics.items()}

    def reset(self) -> None:
        """Forget what was measured."""
        for metric in self.metrics.values():
            metric.reset()

    def _judge_samples(self, samples: Sequence[Completion], judged: Rewards, rewards: Sequence[RewardCallback]) -> None:
        n = self.evaluation.num_samples
        is_correct_PN = self.evaluation.is_correct(judged).view(-1, n)
        for k in self.evaluation.pass_at:
            self._update(f"pass@{k}", pass_at_k(is_correct_PN.sum(dim=1), n, k))
        judge = next((r for r in rewards if r.name == self.evaluation.correct), rewards[0])
        for k in self.evaluation.majority_at:
            wins = [
                majority_is_correct([judge.answer(c) for c in samples[p * n : p * n + k]], row[:k])
                for p, row in enumerate(is_correct_PN.tolist())
            ]
            self._update(f"maj@{k}", torch.tensor(wins))

    def _update(self, name: str, values: Tensor) -> None:
        metric = self.metrics[name]
        if len(values):
            metric.update(values.float().to(metric.device))
        else:
            metric.update(torch.zeros(1, device=metric.device), weight=0.0)


def _requests(batch: Sequence[EvaluationPrompt], num_completions: int) -> list[GenerationRequest]:
    return [
        GenerationRequest(slot=slot, token_ids=prompt.token_ids, num_completions=num_completions)
        for slot, prompt in batch
    ]

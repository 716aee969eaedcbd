"""Evaluation on held-out prompts: what is drawn, and what is measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from grpo_lightning.functional.evaluation import majority_at_k, pass_at_k
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

ROUNDING = 1e-9
"""A total of weighted rewards that misses the threshold by less than this has reached it."""


class Verdict(NamedTuple):
    """Which completions are correct, and of which that is known."""

    correct_B: Tensor
    """bool; False where it is not known."""
    valid_B: Tensor
    """bool; False where the deciding reward failed or does not apply: such a completion counts nowhere."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How held-out prompts are completed and judged.

    Args:
        greedy: Whether each prompt gets a greedy completion, for `accuracy`.
        num_samples: n, samples per prompt, for pass@k and maj@k; 0 for none.
        temperature: Of the samples, > 0.
        top_k: Of the samples; None for all tokens.
        top_p: Of the samples, in (0, 1].
        max_new_tokens: Longest completion in tokens, >= 1; None for as long as in training.
        pass_at: The k of pass@k, each at most `num_samples`; pass@1 is measured whenever there are samples.
        majority_at: The k of maj@k, each at most `num_samples`.
        correct: The reward that says whether a completion is correct; None for the total of all.
        threshold: Correct is a reward of at least this.

    Raises:
        ConfigurationError: A setting is out of its range.
    """

    greedy: bool = True
    num_samples: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    max_new_tokens: int | None = None
    pass_at: tuple[int, ...] = ()
    majority_at: tuple[int, ...] = ()
    correct: str | None = None
    threshold: float = 1.0

    def __post_init__(self) -> None:
        _require("num_samples", self.num_samples >= 0, ">= 0", self.num_samples)
        _require("temperature", self.temperature > 0, "> 0; `greedy` is the temperature of 0", self.temperature)
        _require("top_k", self.top_k is None or self.top_k >= 1, ">= 1 or null", self.top_k)
        _require("top_p", 0 < self.top_p <= 1, "in (0, 1]", self.top_p)
        tokens = self.max_new_tokens
        _require("max_new_tokens", tokens is None or tokens >= 1, ">= 1 or null", tokens)
        _require("greedy", self.greedy or self.num_samples > 0, "true where num_samples is 0", self.greedy)
        for name in ("pass_at", "majority_at"):
            for k in getattr(self, name):
                _require(name, 1 <= k <= self.num_samples, f"between 1 and num_samples = {self.num_samples}", k)

    def check_rewards(self, names: Sequence[str]) -> None:
        """Check, before anything is drawn, that the deciding reward is among the run's rewards `names`.

        Raises:
            ConfigurationError: It is not.
        """
        if self.correct is not None and self.correct not in names:
            raise ConfigurationError(
                f"model.evaluation.correct names no reward: {self.correct!r} is not among {list(names)}."
            )

    def greedily(self, sampling: SamplingParams) -> SamplingParams:
        """How the greedy completions are drawn, where training draws with `sampling`."""
        return replace(self._as_long_as(sampling), temperature=0.0, top_k=None, top_p=1.0)

    def samples(self, sampling: SamplingParams) -> SamplingParams:
        """How the samples are drawn, where training draws with `sampling`."""
        changes = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return replace(self._as_long_as(sampling), **changes)  # type: ignore[arg-type]

    def judge(self, rewards: Rewards) -> Verdict:
        """Which completions are correct."""
        self.check_rewards(rewards.names)
        scores_B = rewards.totals_B
        if self.correct is not None:
            column = rewards.names.index(self.correct)
            scores_B = rewards.values_BK[:, column].masked_fill(rewards.failed_BK[:, column], torch.nan)
        return Verdict(scores_B >= self.threshold - ROUNDING, ~scores_B.isnan())

    def _as_long_as(self, sampling: SamplingParams) -> SamplingParams:
        tokens = self.max_new_tokens or sampling.max_new_tokens
        return replace(sampling, max_new_tokens=tokens, min_new_tokens=min(sampling.min_new_tokens, tokens))


class Scored(NamedTuple):
    """Completions, prompt-major, and what the rewards said of them."""

    completions: Sequence[Completion]
    rewards: Rewards


class BatchEvaluation(NamedTuple):
    """What was drawn for some held-out prompts; None where nothing was asked for, or there are no prompts."""

    num_prompts: int
    greedy: Scored | None
    """One completion per prompt."""
    samples: Scored | None
    """`num_samples` completions per prompt."""


def evaluate_batch(
    batch: Sequence[EvaluationPrompt],
    *,
    evaluation: Evaluation,
    engine: RolloutEngine,
    sampling: SamplingParams,
    coordinates: Coordinates,
    score: Score,
) -> BatchEvaluation:
    """Complete and score some held-out prompts. Changes nothing but what `engine` and `score` change.

    Args:
        batch: The prompts; an empty batch asks nothing of `engine` and `score`.
        evaluation: What is drawn.
        engine: Draws the completions.
        sampling: How training draws.
        coordinates: Of a stream of their own and always of the same iteration, so that two evaluations differ by the
            weights alone.
        score: What the rewards say of completions and their prompts.
    """

    def draw(num_completions: int, sampling: SamplingParams) -> Scored | None:
        if not batch or not num_completions:
            return None
        requests = [
            GenerationRequest(slot=slot, token_ids=prompt.token_ids, num_completions=num_completions)
            for slot, prompt in batch
        ]
        completions = engine.generate(requests, sampling, coordinates)
        return Scored(completions, score([p for _, p in batch for _ in range(num_completions)], completions))

    return BatchEvaluation(
        num_prompts=len(batch),
        greedy=draw(int(evaluation.greedy), evaluation.greedily(sampling)),
        samples=draw(evaluation.num_samples, evaluation.samples(sampling)),
    )


class EvaluationMetrics(Metric):
    """The metrics of one evaluation: fp64 sums and counts, which are added up over ranks, never means.

    ``accuracy`` is the share of correct greedy completions; ``pass@<k>`` and ``maj@<k>`` are means over prompts of
    the estimators in `functional.evaluation`. ``reward/mean``, ``length_mean`` and ``truncation_ratio`` are of the
    greedy completions, or of the samples where there are no greedy ones. Completions whose correctness is unknown
    (a failed reward) take no part; ``failure_ratio`` is their share of all completions. ``num_prompts`` counts the
    prompts. A mean of nothing is NaN.

    Args:
        evaluation: What is drawn and judged.
    """

    full_state_update = False
    totals_2M: Tensor

    def __init__(self, evaluation: Evaluation) -> None:
        super().__init__()
        self.evaluation = evaluation
        names = ["accuracy"] if evaluation.greedy else []
        if evaluation.num_samples:
            self._pass_at = sorted({1, *evaluation.pass_at})
            names += [f"pass@{k}" for k in self._pass_at]
            names += [f"maj@{k}" for k in sorted(set(evaluation.majority_at))]
        self.names = (*names, "reward/mean", "length_mean", "truncation_ratio", "failure_ratio", "num_prompts")
        zeros = torch.zeros(2, len(self.names), dtype=torch.float64)
        self.add_state("totals_2M", zeros, dist_reduce_fx="sum")

    def evaluate(
        self,
        batch: Sequence[EvaluationPrompt],
        *,
        engine: RolloutEngine,
        sampling: SamplingParams,
        coordinates: Coordinates,
        score: Score,
        rewards: Sequence[RewardCallback],
    ) -> BatchEvaluation:
        """Complete, score and count some prompts; the arguments are those of `evaluate_batch` and `update`."""
        result = evaluate_batch(
            batch,
            evaluation=self.evaluation,
            engine=engine,
            sampling=sampling,
            coordinates=coordinates,
            score=score,
        )
        self.update(result, rewards)
        return result

    def update(self, result: BatchEvaluation, rewards: Sequence[RewardCallback] = ()) -> None:
        """Count what was drawn; `rewards` say what the final answers are, which maj@k alone needs."""
        self._add("num_prompts", torch.tensor([result.num_prompts]))
        if result.greedy is not None:
            verdict = self.evaluation.judge(result.greedy.rewards)
            self._add("accuracy", verdict.correct_B[verdict.valid_B])
        if result.samples is not None:
            self._update_samples(result.samples, rewards)
        for scored in filter(None, (result.greedy, result.samples)):
            self._add("failure_ratio", scored.rewards.failed_BK.any(dim=1))
        described = result.greedy or result.samples
        if described is not None:
            self._add("reward/mean", described.rewards.totals_B[described.rewards.valid_B])
            self._add("length_mean", torch.tensor([len(c.token_ids) for c in described.completions]))
            self._add("truncation_ratio", torch.tensor([c.is_truncated for c in described.completions]))

    def compute(self) -> dict[str, Tensor]:
        """Every metric by its name."""
        values = dict(zip(self.names, self.totals_2M[0] / self.totals_2M[1], strict=True))
        return {**values, "num_prompts": self.totals_2M[0, self.names.index("num_prompts")]}

    def take(self) -> dict[str, Tensor]:
        """What `compute` says; then begin the next evaluation."""
        values: dict[str, Tensor] = self.compute()
        self.reset()
        return values

    def _update_samples(self, samples: Scored, rewards: Sequence[RewardCallback]) -> None:
        shape_PS = (-1, self.evaluation.num_samples)
        verdict = self.evaluation.judge(samples.rewards)
        correct_PS, valid_PS = verdict.correct_B.view(shape_PS), verdict.valid_B.view(shape_PS)
        for k in self._pass_at:
            self._add_known(f"pass@{k}", pass_at_k(valid_PS.sum(dim=1), correct_PS.sum(dim=1), k=k))
        if not self.evaluation.majority_at:
            return
        judge = _answering(rewards, self.evaluation.correct)
        answers_PS = _numbered([judge.answer(c) for c in samples.completions], self.evaluation.num_samples)
        for k in set(self.evaluation.majority_at):
            self._add_known(f"maj@{k}", majority_at_k(answers_PS, correct_PS, valid_PS, k=k))

    def _add(self, name: str, values: Tensor) -> None:
        total = torch.stack([values.double().sum(), torch.tensor(float(len(values)), dtype=torch.float64)])
        self.totals_2M[:, self.names.index(name)] += total.to(self.totals_2M.device)

    def _add_known(self, name: str, values: Tensor) -> None:
        self._add(name, values[~values.isnan()])


def _require(name: str, is_fulfilled: bool, expected: str, got: object) -> None:
    if not is_fulfilled:
        raise ConfigurationError(f"model.evaluation.{name} must be {expected}, got {got}.")


def _answering(rewards: Sequence[RewardCallback], correct: str | None) -> RewardCallback:
    """The reward that reads final answers: the deciding one, else the first that says how, else the first."""
    named = [reward for reward in rewards if reward.name == correct]
    reading = [reward for reward in rewards if type(reward).answer is not RewardCallback.answer]
    return [*named, *reading, *rewards][0]


def _numbered(answers: Sequence[str | None], num_samples: int) -> Tensor:
    """Equal answers of a prompt get equal numbers, counted from 0 within the prompt; no answer is -1."""
    rows = []
    for first in range(0, len(answers), num_samples):
        numbers: dict[str | None, int] = {}
        row = answers[first : first + num_samples]
        rows.append([-1 if answer is None else numbers.setdefault(answer, len(numbers)) for answer in row])
    return torch.tensor(rows, dtype=torch.int64).view(-1, num_samples)

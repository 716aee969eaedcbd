"""An overlay of `configs/algorithm/` at work on a recorded iteration, through the stages that a run has."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import replay
import torch
import yaml
from papers.batches import WEIGHTS, Drawn, Iteration
from torch import Tensor

from grpo_lightning import groups
from grpo_lightning.batching import (
    Experience,
    Forward,
    IterationShape,
    Sample,
    cut_into_minibatches,
    global_counts,
    scored_groups,
)
from grpo_lightning.batching.experience import loss_batch
from grpo_lightning.batching.padded import Padded, padded
from grpo_lightning.objective import Objective
from grpo_lightning.objective.credit import on_one_rank
from grpo_lightning.preparation import Preparation
from grpo_lightning.rewards import RewardCallback, score_rollout
from grpo_lightning.types import (
    Completion,
    FinishReason,
    ForwardBatch,
    LossBatch,
    Prompt,
    Rollout,
    StepScores,
    TokenScores,
)

FOLDER = Path(__file__).parents[2] / "configs/algorithm"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
FORWARD = Forward(layout=Padded(), temperature=1.0, max_tokens=None, device=torch.device("cpu"))


class Table:
    """A policy that knows the log-probability of each token of the iteration, whatever came before it."""

    def __init__(self, logprobs: Tensor) -> None:
        self.logprobs = logprobs

    def __call__(self, batch: ForwardBatch, temperature: float) -> TokenScores:
        nothing_BT = self.logprobs.new_zeros(batch.num_completions, batch.max_completion_tokens)
        where = (batch.rows_N, batch.columns_N)
        return TokenScores(nothing_BT.index_put(where, self.logprobs[batch.targets_N]), nothing_BT)


class Recorded(RewardCallback):
    """Says of a completion what the iteration has of it; a score that failed is raised or, by the others, returned."""

    def __init__(self, name: str, of_first_token: dict[int, Drawn]) -> None:
        super().__init__(name, WEIGHTS[name])
        self.of_first_token = of_first_token

    def score(self, prompts, completions):
        scores = [self.of_first_token[completion.token_ids[0]].scores.get(self.name) for completion in completions]
        if self.name == "correct" and any(score != score for score in scores):
            raise ZeroDivisionError
        return [StepScores(tuple(s.values()), tuple(s)) if isinstance(s, dict) else s for s in scores]


@dataclass(frozen=True)
class Learning:
    """An iteration, ready for its updates.

    Args:
        objective: Of the overlay.
        experience: What the updates learn from.
        num_updates: Of the iteration.
    """

    objective: Objective
    experience: Experience
    num_updates: int

    def samples(self, update: int) -> tuple[Sample, ...]:
        """The samples of an update, in the order of their slots."""
        return self.experience.minibatches[update % len(self.experience.minibatches)]

    def loss(self, update: int, now: Tensor, cut: Sequence[Sequence[int]] | None = None) -> Tensor:
        """The loss of an update, as the sum over micro-batches.

        Args:
            update: Its number in the iteration.
            now: The log-probability of each token.
            cut: The samples of each micro-batch; None for one micro-batch.
        """
        samples = self.samples(update)
        compute = partial(
            self.objective.loss,
            counts=self.experience.counts_of(update),
            coefficients=self.objective.coefficients,
        )
        parts = [[samples[i] for i in part] for part in cut or [range(len(samples))]]
        return sum(output.loss for part in parts for output in FORWARD.losses(Table(now), [part], compute))

    def loss_and_gradient(self, update: int, now: Tensor, cut: Sequence[Sequence[int]] | None = None):
        """Both, the second with respect to the log-probabilities."""
        leaf = now.detach().clone().requires_grad_()
        loss = self.loss(update, leaf, cut)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def settings(name: str) -> dict:
    """What an overlay states of the module."""
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["model"]["init_args"]


def learning(name: str, iteration: Iteration, objective: Objective | None = None) -> Learning:
    """Prepare an iteration by an overlay: four updates of two minibatches, unless the overlay says otherwise.

    Args:
        name: Of the overlay.
        iteration: What was drawn.
        objective: Another than the overlay's.
    """
    stated, objective = settings(name), objective or replay.overlay(name)
    shape = IterationShape(
        prompts_per_iteration=len(iteration.groups),
        group_size=len(iteration.groups[0]),
        num_epochs=stated.get("num_epochs", 2),
        num_minibatches=stated.get("num_minibatches", 2),
    )
    rollout = _rollout(iteration)
    rewards = score_rollout(_rewards(iteration), rollout.completion_prompts, rollout.completions)
    scored = scored_groups(rollout, rewards).kept_by(_filter(stated["groups"]).keep)
    learned_B = scored.valid_PG.flatten() & objective.keeps(rollout.is_truncated_B)
    minibatches = cut_into_minibatches(rollout, learned_B, shape)
    experience = Experience.build(
        iteration=0,
        minibatches=minibatches,
        counts=global_counts(minibatches, list),
        metrics={},
        accumulate_grad_batches=1,
        layout=Padded(),
    )
    preparation = _preparation(objective, iteration, shape.num_updates)
    experience, _ = preparation.fill_in(experience, scored, rollout, rewards)
    return Learning(objective, experience, shape.num_updates)


def _preparation(objective: Objective, iteration: Iteration, num_updates: int) -> Preparation:
    old, reference = (Table(torch.tensor(row, dtype=torch.float64)) for row in (iteration.old, iteration.reference))
    return Preparation(
        objective=objective,
        policy=old,
        reference=reference if objective.needs_reference else None,
        forward=FORWARD,
        num_updates=num_updates,
        coefficients=objective.coefficients,
        gather=on_one_rank,
    )


def _filter(stated: dict) -> groups.GroupFilter:
    return getattr(groups, stated["class_path"])(**stated.get("init_args", {}))


def _rewards(iteration: Iteration) -> list[Recorded]:
    of_first_token = {drawn.token_ids[0]: drawn for group in iteration.groups for drawn in group}
    return [Recorded(name, of_first_token) for name in WEIGHTS]


def padded_minibatch(mine: Learning, update: int, now: Tensor) -> tuple[TokenScores, LossBatch]:
    """All samples of an update side by side; the scores are leaves to differentiate by."""
    samples = mine.samples(update)
    batch = padded([s.prompt_ids for s in samples], [s.completion_ids for s in samples], FORWARD.device)
    scores = Table(now)(batch, FORWARD.temperature)
    return TokenScores(*(part.clone().requires_grad_() for part in scores)), loss_batch(samples, FORWARD.device)


def _rollout(iteration: Iteration) -> Rollout:
    return Rollout(
        iteration=0,
        slots=tuple(range(len(iteration.groups))),
        prompts=tuple(Prompt(index=p, token_ids=(0,) * (p % 3 + 1), text="") for p in range(len(iteration.groups))),
        completions=tuple(
            Completion(
                token_ids=tuple(drawn.token_ids),
                sampler_logprobs=tuple(iteration.sampler[n] for n in drawn.token_ids),
                text="",
                finish_reason=FinishReason.LENGTH if drawn.is_truncated else FinishReason.EOS,
                loss_mask=drawn.is_mine,
            )
            for group in iteration.groups
            for drawn in group
        ),
    )

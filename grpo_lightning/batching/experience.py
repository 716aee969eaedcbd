"""The experience of an iteration: scored completions, ready for the updates."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from grpo_lightning.batching.bins import balanced_bins
from grpo_lightning.types import LossBatch, MinibatchCounts


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion of an experience. Its place in the iteration is (slot, index), the same on any number of ranks."""

    slot: int
    index: int
    prompt_ids: Tensor
    completion_ids: Tensor
    loss_mask: Tensor
    """bool, one per completion token; all False where nothing is learned from it."""
    advantage: float
    old_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True, kw_only=True)
class Experience:
    """What one rank learns from in one iteration."""

    iteration: int
    minibatches: tuple[tuple[Sample, ...], ...]
    """The samples with loss tokens, by minibatch."""
    counts: tuple[MinibatchCounts, ...]
    """Of each minibatch, over all ranks."""
    bins: tuple[tuple[tuple[int, ...], ...], ...]
    """Of each minibatch, the indices of each micro-batch's samples."""
    metrics: dict[str, float]
    """What the rollout and the rewards looked like, over all ranks."""

    @classmethod
    def build(
        cls,
        *,
        iteration: int,
        minibatches: Sequence[Sequence[Sample]],
        counts: Sequence[MinibatchCounts],
        metrics: dict[str, float],
        accumulate_grad_batches: int,
    ) -> "Experience":
        """Spread each minibatch over its micro-batches."""
        ordered = [tuple(sorted(samples, key=lambda s: (s.slot, s.index))) for samples in minibatches]
        bins = [balanced_bins([s.length for s in samples], accumulate_grad_batches) for samples in ordered]
        return cls(
            iteration=iteration,
            minibatches=tuple(ordered),
            counts=tuple(counts),
            bins=tuple(tuple(tuple(b) for b in of_minibatch) for of_minibatch in bins),
            metrics=metrics,
        )

    def microbatch(self, minibatch: int, microbatch: int) -> list[Sample]:
        """The samples of one micro-batch; none where there are fewer samples than micro-batches."""
        return [self.minibatches[minibatch][i] for i in self.bins[minibatch][microbatch]]

    def with_logprobs(self, name: str, logprobs: Sequence[Sequence[Tensor]]) -> "Experience":
        """The same experience with `old_logprobs` or `reference_logprobs` filled in, by minibatch and sample."""
        filled = tuple(
            tuple(
                replace(sample, **dict[str, Any]({name: values})) for sample, values in zip(samples, rows, strict=True)
            )
            for samples, rows in zip(self.minibatches, logprobs, strict=True)
        )
        return replace(self, minibatches=filled)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors; those of several ranks are merged by `merged_state`."""
        return {
            "iteration": self.iteration,
            "counts": [tuple(counts) for counts in self.counts],
            "metrics": dict(self.metrics),
            "minibatches": [[vars(sample).copy() for sample in samples] for samples in self.minibatches],
        }

    @classmethod
    def from_state_dict(
        cls, state: dict[str, Any], *, rank: int, world_size: int, accumulate_grad_batches: int
    ) -> "Experience":
        """The share of one rank, of any number of ranks: slots are dealt out in turn."""
        mine = [[Sample(**s) for s in samples if s["slot"] % world_size == rank] for samples in state["minibatches"]]
        return cls.build(
            iteration=state["iteration"],
            minibatches=mine,
            counts=[MinibatchCounts(*counts) for counts in state["counts"]],
            metrics=state["metrics"],
            accumulate_grad_batches=accumulate_grad_batches,
        )


def merged_state(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One state with the samples of every rank."""
    per_minibatch = zip(*(state["minibatches"] for state in states), strict=True)
    return {**states[0], "minibatches": [[s for rank in ranks for s in rank] for ranks in per_minibatch]}


def loss_batch(samples: Sequence[Sample], device: torch.device) -> LossBatch:
    """What the objective needs of some samples, padded to the longest completion."""

    def pad(rows: Sequence[Tensor | None]) -> Tensor | None:
        known = [row for row in rows if row is not None]
        return pad_sequence(known, batch_first=True).to(device) if known else None

    mask_BT = pad([s.loss_mask for s in samples])
    assert mask_BT is not None, "a loss batch has samples"
    return LossBatch(
        advantages_BT=torch.tensor([s.advantage for s in samples], dtype=torch.float64, device=device)[:, None],
        mask_BT=mask_BT,
        old_logprobs_BT=pad([s.old_logprobs for s in samples]),
        reference_logprobs_BT=pad([s.reference_logprobs for s in samples]),
    )

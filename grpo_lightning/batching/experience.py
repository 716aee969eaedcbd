"""The experience of an iteration: scored completions, ready for the updates."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from grpo_lightning.batching.layout import Layout
from grpo_lightning.types import LossBatch, MinibatchCounts

Place = tuple[int, int]
"""Where a completion stands in its iteration, on any number of ranks: its prompt's slot, its number in the group."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion of an experience, with a column per thing that is known of its tokens."""

    slot: int
    index: int
    prompt_ids: Tensor
    completion_ids: Tensor
    loss_mask: Tensor
    """bool, one per completion token; all False where nothing is learned from it."""
    group_tokens: int
    """The loss tokens of its group."""
    advantages: Tensor | None = None
    """float64, of each token, or a single one that all of them share; None until they are known."""
    old_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    sampler_logprobs: Tensor | None = None
    policy_mask: Tensor | None = None
    """bool, the tokens that keep their policy gradient; None for all."""

    @property
    def place(self) -> Place:
        """Where it stands in the iteration."""
        return self.slot, self.index


def blank_sample() -> Sample:
    """One token to learn nothing from: it stands in for the samples of a rank that has none."""
    return Sample(
        slot=-1,
        index=0,
        prompt_ids=torch.zeros(1, dtype=torch.long),
        completion_ids=torch.zeros(1, dtype=torch.long),
        loss_mask=torch.zeros(1, dtype=torch.bool),
        group_tokens=1,
    )


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
    blank: Sample = field(default_factory=blank_sample)
    """Has the columns of every sample, also on a rank without any."""
    num_pieces: tuple[tuple[int, ...], ...] | None = None
    """Of each micro-batch of each minibatch, as the ranks have agreed; None where each cuts its own as it likes."""

    @classmethod
    def build(
        cls,
        *,
        iteration: int,
        minibatches: Sequence[Sequence[Sample]],
        counts: Sequence[MinibatchCounts],
        metrics: dict[str, float],
        accumulate_grad_batches: int,
        layout: Layout,
        blank: Sample | None = None,
    ) -> "Experience":
        """Spread each minibatch over its micro-batches, as its layout finds it cheapest."""
        ordered = [tuple(sorted(samples, key=lambda s: (s.slot, s.index))) for samples in minibatches]
        bins = [layout.bins(samples, accumulate_grad_batches) for samples in ordered]
        return cls(
            iteration=iteration,
            minibatches=tuple(ordered),
            counts=tuple(counts),
            bins=tuple(tuple(tuple(b) for b in of_minibatch) for of_minibatch in bins),
            metrics=metrics,
            blank=blank or blank_sample(),
        )

    def counts_of(self, update: int) -> MinibatchCounts:
        """What the minibatch of an update counts. Every epoch takes the minibatches in the same order."""
        return self.counts[update % len(self.counts)]

    def microbatch(self, update: int, microbatch: int) -> list[Sample]:
        """The samples of one micro-batch; the blank one where there are fewer samples than micro-batches."""
        minibatch = update % len(self.minibatches)
        samples = [self.minibatches[minibatch][i] for i in self.bins[minibatch][microbatch]]
        return samples or [self.blank]

    def num_pieces_of(self, update: int, microbatch: int) -> int | None:
        """Into how many pieces every rank cuts one micro-batch; None where they need not agree."""
        return None if self.num_pieces is None else self.num_pieces[update % len(self.num_pieces)][microbatch]

    def samples(self) -> Iterator[Sample]:
        """All of them."""
        return (sample for samples in self.minibatches for sample in samples)

    def with_column(self, name: str, rows: Mapping[Place, Tensor], *, dtype: torch.dtype) -> "Experience":
        """The same experience with a column of its samples filled in.

        Args:
            name: `old_logprobs`, `advantages` ...
            rows: Of each sample, by its place.
            dtype: Of the rows, which a rank without samples cannot see.
        """

        def filled(sample: Sample, row: Tensor) -> Sample:
            return Sample(**vars(sample) | {name: row})  # half the time of `replace`

        return replace(
            self,
            minibatches=tuple(tuple(filled(s, rows[s.place]) for s in samples) for samples in self.minibatches),
            blank=filled(self.blank, torch.zeros(1, dtype=dtype)),
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors; those of several ranks are merged by `merged_state`."""
        return {
            "iteration": self.iteration,
            "counts": [tuple(counts) for counts in self.counts],
            "metrics": dict(self.metrics),
            "minibatches": [[vars(sample).copy() for sample in samples] for samples in self.minibatches],
            "blank": vars(self.blank).copy(),
        }

    @classmethod
    def from_state_dict(
        cls, state: dict[str, Any], *, rank: int, world_size: int, accumulate_grad_batches: int, layout: Layout
    ) -> "Experience":
        """The share of one rank, of any number of ranks: slots are dealt out in turn."""
        mine = [[Sample(**s) for s in samples if s["slot"] % world_size == rank] for samples in state["minibatches"]]
        return cls.build(
            iteration=state["iteration"],
            minibatches=mine,
            counts=[MinibatchCounts(*counts) for counts in state["counts"]],
            metrics=state["metrics"],
            accumulate_grad_batches=accumulate_grad_batches,
            layout=layout,
            blank=Sample(**state["blank"]),
        )


def merged_state(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One state with the samples of every rank."""
    per_minibatch = zip(*(state["minibatches"] for state in states), strict=True)
    return {**states[0], "minibatches": [[s for rank in ranks for s in rank] for ranks in per_minibatch]}


def loss_batch(samples: Sequence[Sample], device: torch.device) -> LossBatch:
    """What the objective needs of some samples, padded to the longest completion."""

    def pad(rows: Sequence[Tensor | None]) -> Tensor | None:
        known = [row for row in rows if row is not None]
        if not known:
            return None
        if all(len(row) == 1 for row in known):  # one advantage each, most often: several times faster
            return torch.cat(known)[:, None].to(device)
        return pad_sequence(known, batch_first=True).to(device)

    advantages_BT, mask_BT = pad([s.advantages for s in samples]), pad([s.loss_mask for s in samples])
    assert advantages_BT is not None, "advantages are known before the first loss"
    assert mask_BT is not None, "a loss batch has samples"
    return LossBatch(
        advantages_BT=advantages_BT,
        mask_BT=mask_BT,
        group_tokens_B=torch.tensor([s.group_tokens for s in samples], device=device),
        old_logprobs_BT=pad([s.old_logprobs for s in samples]),
        reference_logprobs_BT=pad([s.reference_logprobs for s in samples]),
        sampler_logprobs_BT=pad([s.sampler_logprobs for s in samples]),
        policy_mask_BT=pad([s.policy_mask for s in samples]),
    )

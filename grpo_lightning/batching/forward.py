"""Samples through a policy: in pieces that fit into memory, laid out, and scored."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from grpo_lightning.batching.bins import cut_finer
from grpo_lightning.batching.experience import Experience, Place, Sample, loss_batch
from grpo_lightning.batching.layout import Layout
from grpo_lightning.types import ForwardBatch, LossBatch, LossOutput, TokenScores

ScoreTokens = Callable[[ForwardBatch, float], TokenScores]
"""A policy: it scores the completion tokens of a batch at a temperature."""
Loss = Callable[[TokenScores, LossBatch], LossOutput]
"""The loss of some completions of a minibatch, as a share of the whole minibatch's."""


class ExperienceScores(NamedTuple):
    """What a policy says of the tokens of each sample, by its place; one value per completion token, on the CPU."""

    logprobs: dict[Place, Tensor]
    entropies: dict[Place, Tensor]


class InStep(NamedTuple):
    """What ranks need that put weights together for every forward, and so make each forward and backward together."""

    agree: Callable[[Sequence[int]], list[int]]
    """A collective: from numbers of this rank to the largest of each."""
    backward: Callable[[Tensor], None]
    """Adds the gradient of a part of a micro-batch's loss to that of the update, at once."""


@dataclass(frozen=True, kw_only=True)
class Forward:
    """How samples go through a policy.

    Args:
        layout: How they are laid out.
        temperature: At which the completions were drawn.
        max_tokens: Largest piece, in laid-out tokens, that is computed at once; None for no limit.
        device: Where the forward runs.
        in_step: None where each rank may make as many forwards as it likes.
    """

    layout: Layout
    temperature: float
    max_tokens: int | None
    device: torch.device
    in_step: InStep | None = None

    def agreed(self, experience: Experience) -> Experience:
        """The experience with a number of pieces for each micro-batch, where ranks must agree on it. A collective."""
        if self.in_step is None or self.max_tokens is None:
            return experience
        microbatches = [experience.microbatch(m, i) for m, bins in enumerate(experience.bins) for i in range(len(bins))]
        numbers = iter(self.in_step.agree([len(self._cut(samples)) for samples in microbatches]))
        return replace(experience, num_pieces=tuple(tuple(islice(numbers, len(bins))) for bins in experience.bins))

    def pieces(self, experience: Experience, update: int, microbatch: int) -> list[list[Sample]]:
        """One micro-batch in pieces of at most `max_tokens`, or in as many smaller ones as the ranks have agreed on.

        A rank with fewer samples than pieces has the blank one in some.
        """
        samples = experience.microbatch(update, microbatch)
        pieces = self._cut(samples)
        pieces = cut_finer(pieces, experience.num_pieces_of(update, microbatch) or len(pieces))
        return [[samples[i] for i in piece] or [experience.blank] for piece in pieces]

    def losses(self, policy: ScoreTokens, pieces: Sequence[Sequence[Sample]], loss: Loss) -> Iterator[LossOutput]:
        """The losses of the pieces of a micro-batch, to be added up.

        Where there is more than one, the activations of one alone are ever in memory: each is computed again in the
        backward pass. Where ranks make it in step, so would all weights and gradients be whole at once: there, each but
        the last is learned from before the next is computed, and its loss has no gradient any more.
        """
        for number, piece in enumerate(pieces, start=1):
            compute = partial(self._loss, policy, self._batch(piece), loss_batch(piece, self.device), loss)
            if len(pieces) == 1:
                yield compute()
            elif self.in_step is None:
                yield recompute_in_backward(compute, use_reentrant=False)
            else:
                yield compute() if number == len(pieces) else _learned(compute(), self.in_step)

    @torch.no_grad()
    def logprobs(self, policy: ScoreTokens, experience: Experience) -> dict[Place, Tensor]:
        """The log-probabilities of every sample's tokens, through the same pieces as the losses; on the CPU."""
        pieces = self._scored(policy, experience)
        return {place: row for piece, scores in pieces for place, row in _by_place(piece, scores.logprobs_BT)}

    @torch.no_grad()
    def scores(self, policy: ScoreTokens, experience: Experience) -> ExperienceScores:
        """As `logprobs`, with the entropies."""
        result = ExperienceScores({}, {})
        for piece, scores in self._scored(policy, experience):
            result.logprobs.update(_by_place(piece, scores.logprobs_BT))
            result.entropies.update(_by_place(piece, scores.entropy_BT))
        return result

    def _scored(self, policy: ScoreTokens, experience: Experience) -> Iterator[tuple[list[Sample], TokenScores]]:
        for m, bins in enumerate(experience.bins):
            for piece in (piece for i in range(len(bins)) for piece in self.pieces(experience, m, i)):
                yield piece, policy(self._batch(piece), self.temperature)

    def _loss(self, policy: ScoreTokens, forward: ForwardBatch, batch: LossBatch, loss: Loss) -> LossOutput:
        return loss(policy(forward, self.temperature), batch)

    def _cut(self, samples: Sequence[Sample]) -> list[list[int]]:
        return self.layout.pieces(samples, self.max_tokens)

    def _batch(self, samples: Sequence[Sample]) -> ForwardBatch:
        return self.layout.lay_out(samples, self.device)


def _learned(output: LossOutput, in_step: InStep) -> LossOutput:
    """The loss, once its gradient has been taken."""
    in_step.backward(output.loss)
    return output._replace(loss=output.loss.detach())


def _by_place(samples: Sequence[Sample], values_BT: Tensor) -> Iterator[tuple[Place, Tensor]]:
    """Each sample's values, without the padding."""
    for sample, row in zip(samples, values_BT.cpu(), strict=True):
        yield sample.place, row[: len(sample.completion_ids)].clone()

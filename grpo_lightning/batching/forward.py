"""Samples through a policy: in pieces that fit into memory, laid out, and scored."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute_in_backward

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


@dataclass(frozen=True, kw_only=True)
class Forward:
    """How samples go through a policy.

    Args:
        layout: How they are laid out.
        temperature: At which the completions were drawn.
        max_tokens: Largest piece, in laid-out tokens, that is computed at once; None for no limit.
        device: Where the forward runs.
    """

    layout: Layout
    temperature: float
    max_tokens: int | None
    device: torch.device

    def losses(self, policy: ScoreTokens, samples: Sequence[Sample], loss: Loss) -> Iterator[LossOutput]:
        """The losses of the pieces of a micro-batch, to be added up.

        Where there is more than one, each is computed again in the backward pass, so that the activations of one alone
        are ever in memory.
        """
        pieces = self._pieces(samples)
        for piece in pieces:
            compute = partial(self._loss, policy, self._batch(piece), loss_batch(piece, self.device), loss)
            yield compute() if len(pieces) == 1 else recompute_in_backward(compute, use_reentrant=False)

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
            microbatches = (experience.microbatch(m, i) for i in range(len(bins)))
            for piece in (piece for microbatch in microbatches for piece in self._pieces(microbatch)):
                yield piece, policy(self._batch(piece), self.temperature)

    def _loss(self, policy: ScoreTokens, forward: ForwardBatch, batch: LossBatch, loss: Loss) -> LossOutput:
        return loss(policy(forward, self.temperature), batch)

    def _pieces(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        return [[samples[i] for i in piece] for piece in self.layout.pieces(samples, self.max_tokens)]

    def _batch(self, samples: Sequence[Sample]) -> ForwardBatch:
        return self.layout.lay_out(samples, self.device)


def _by_place(samples: Sequence[Sample], values_BT: Tensor) -> Iterator[tuple[Place, Tensor]]:
    """Each sample's values, without the padding."""
    for sample, row in zip(samples, values_BT.cpu(), strict=True):
        yield sample.place, row[: len(sample.completion_ids)].clone()

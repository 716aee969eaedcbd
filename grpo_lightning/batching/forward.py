"""Samples through a policy: in pieces that fit into memory, laid out, and scored."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from grpo_lightning.batching.bins import chunks
from grpo_lightning.batching.experience import Experience, Sample, loss_batch
from grpo_lightning.batching.padded import padded
from grpo_lightning.types import ForwardBatch, LossBatch, LossOutput, TokenScores

ScoreTokens = Callable[[ForwardBatch, float], TokenScores]
"""A policy: it scores the completion tokens of a batch at a temperature."""
Loss = Callable[[TokenScores, LossBatch], LossOutput]
"""The loss of some completions of a minibatch, as a share of the whole minibatch's."""


@dataclass(frozen=True, kw_only=True)
class Forward:
    """How samples go through a policy.

    Args:
        temperature: At which the completions were drawn.
        max_tokens: Largest piece, in padded tokens, that is computed at once; None for no limit.
        device: Where the forward runs.
    """

    temperature: float
    max_tokens: int | None
    device: torch.device

    def losses(self, policy: ScoreTokens, samples: Sequence[Sample], loss: Loss) -> Iterator[LossOutput]:
        """The losses of the pieces of a micro-batch, to be added up.

        Where there is more than one, each is computed again in the backward pass, so that the activations of one alone
        are ever in memory. A rank without samples gets a zero that depends on every weight: it still takes part in the
        strategy's collectives.
        """
        pieces = self._pieces(samples)
        if not pieces:
            yield LossOutput(self._zero(policy), {})
        for piece in pieces:
            compute = partial(self._loss, policy, self._batch(piece), loss_batch(piece, self.device), loss)
            yield compute() if len(pieces) == 1 else recompute_in_backward(compute, use_reentrant=False)

    @torch.no_grad()
    def logprobs(self, policy: ScoreTokens, experience: Experience) -> list[list[Tensor]]:
        """Log-probabilities of every sample's tokens, through the same pieces as the losses.

        Returns:
            By minibatch and sample, a tensor of one value per completion token, on the CPU.
        """
        result: list[list[Tensor]] = []
        for m, samples in enumerate(experience.minibatches):
            by_sample: dict[tuple[int, int], Tensor] = {}
            microbatches = (experience.microbatch(m, i) for i in range(len(experience.bins[m])))
            for piece in (piece for microbatch in microbatches for piece in self._pieces(microbatch)):
                logprobs_BT = policy(self._batch(piece), self.temperature).logprobs_BT.cpu()
                for s, row in zip(piece, logprobs_BT, strict=True):
                    by_sample[s.slot, s.index] = row[: len(s.completion_ids)].clone()
            result.append([by_sample[s.slot, s.index] for s in samples])
        return result

    def _loss(self, policy: ScoreTokens, forward: ForwardBatch, batch: LossBatch, loss: Loss) -> LossOutput:
        return loss(policy(forward, self.temperature), batch)

    def _zero(self, policy: ScoreTokens) -> Tensor:
        one = torch.zeros(1, dtype=torch.long)
        return policy(padded([one], [one], self.device), self.temperature).logprobs_BT.sum() * 0.0

    def _pieces(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        pieces = chunks(range(len(samples)), [s.length for s in samples], self.max_tokens)
        return [[samples[i] for i in piece] for piece in pieces if piece]

    def _batch(self, samples: Sequence[Sample]) -> ForwardBatch:
        return padded([s.prompt_ids for s in samples], [s.completion_ids for s in samples], self.device)

"""Cases for the tests of the objective: scored groups, and ragged completions under free log-probabilities."""

from dataclasses import dataclass

import torch

from grpo_lightning.objective import Objective
from grpo_lightning.types import Coefficients, LossBatch, LossOutput, MinibatchCounts, ScoredGroups, TokenScores

NAN = float("nan")


@dataclass
class Minibatch:
    """Four completions of 3, 1, 4 and 2 loss tokens, the first two of one group; everything random."""

    logprobs_BT: torch.Tensor
    batch: LossBatch
    counts: MinibatchCounts

    def loss(self, objective: Objective, *, coefficients: Coefficients | None = None, rows=slice(None)) -> LossOutput:
        batch = LossBatch(*(None if part is None else part[rows] for part in self.batch))
        logprobs_BT = self.logprobs_BT[rows]
        scores = TokenScores(logprobs_BT, -logprobs_BT)
        return objective.loss(scores, batch, self.counts, coefficients or objective.coefficients)

    def gradient(self, objective: Objective, **settings) -> torch.Tensor:
        return torch.autograd.grad(self.loss(objective, **settings).loss, self.logprobs_BT)[0]


def ragged_minibatch() -> Minibatch:
    generator = torch.Generator().manual_seed(0)

    def logprobs():
        return (-torch.rand(4, 4, dtype=torch.float64, generator=generator)).masked_fill(~mask_BT, 0.0)

    mask_BT = torch.arange(4) < torch.tensor([[3], [1], [4], [2]])
    batch = LossBatch(
        advantages_BT=torch.tensor([[1.0], [-1.0], [0.5], [-2.0]], dtype=torch.float64),
        mask_BT=mask_BT,
        group_tokens_B=torch.tensor([4, 4, 6, 6]),
        old_logprobs_BT=logprobs(),
        reference_logprobs_BT=logprobs(),
        sampler_logprobs_BT=logprobs(),
    )
    return Minibatch(logprobs().requires_grad_(), batch, MinibatchCounts(tokens=10, sequences=4, groups=2))


def scored(rewards, *, slots=None, lengths=None, values=None, weights=(1.0,)):
    """Groups of these rewards; NaN is not valid."""
    rewards_PG = torch.tensor(rewards, dtype=torch.float64)
    values_PGK = rewards_PG[..., None] if values is None else torch.tensor(values, dtype=torch.float64)
    return ScoredGroups(
        slots_P=torch.arange(len(rewards_PG)) if slots is None else torch.tensor(slots),
        rewards_PG=rewards_PG,
        valid_PG=~rewards_PG.isnan(),
        values_PGK=values_PGK,
        weights_K=torch.tensor(weights, dtype=torch.float64),
        lengths_PG=torch.ones_like(rewards_PG, dtype=torch.long) if lengths is None else torch.tensor(lengths),
    )

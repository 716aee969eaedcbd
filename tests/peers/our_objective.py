"""Our `Objective`, handed the same recorded rollout."""

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_lightning.objective import Objective
from grpo_lightning.types import LossBatch, MinibatchCounts, ScoredGroups, TokenScores
from peers.rollout import GROUP_SIZE, LENGTHS, Outcome, RecordedRollout


def our_advantages(objective: Objective, rollout: RecordedRollout) -> Tensor:
    """Shape [B, 1]."""
    applies_BK = ~rollout.rewards_BK.isnan()
    weights_K = torch.tensor(rollout.weights_K)
    totals_B = (rollout.rewards_BK.nan_to_num(0.0) * weights_K).sum(dim=1)
    groups = ScoredGroups(
        slots_P=torch.arange(len(LENGTHS) // GROUP_SIZE),
        rewards_PG=totals_B.view(-1, GROUP_SIZE),
        valid_PG=applies_BK.any(dim=1).view(-1, GROUP_SIZE),
        values_PGK=rollout.rewards_BK.view(-1, GROUP_SIZE, len(weights_K)),
        weights_K=weights_K,
        lengths_PG=torch.tensor(LENGTHS).view(-1, GROUP_SIZE),
    )
    return objective.advantages(groups, objective.coefficients)


def our_outcome(
    objective: Objective, rollout: RecordedRollout, *, microbatches: Sequence[Tensor] | None = None
) -> Outcome:
    """The sum of the losses of the micro-batches, which are shares of the whole."""
    batch = _batch(objective, rollout)
    whole = [torch.arange(len(LENGTHS))]
    losses = [_loss(objective, rollout, batch, rows, _counts(batch)) for rows in microbatches or whole]
    return Outcome.of(torch.stack(losses).sum(), rollout, list(microbatches or whole))


def loss_by_itself(objective: Objective, rollout: RecordedRollout, rows: Tensor) -> Tensor:
    """The loss of some completions as if they were the whole minibatch."""
    batch = _batch(objective, rollout)
    return _loss(objective, rollout, batch, rows, _counts(_taken(batch, rows)))


def _loss(objective, rollout, batch, rows, counts) -> Tensor:
    scores = TokenScores(rollout.logprobs_BT[rows], rollout.entropy_BT[rows])
    return objective.loss(scores, _taken(batch, rows), counts, objective.coefficients).loss


def _taken(batch: LossBatch, rows: Tensor) -> LossBatch:
    return LossBatch(*(None if part is None else part[rows] for part in batch))


def _batch(objective: Objective, rollout: RecordedRollout) -> LossBatch:
    mask_BT = rollout.mask_BT & objective.keeps(rollout.is_truncated_B)[:, None]
    group_tokens_P = mask_BT.view(-1, GROUP_SIZE, mask_BT.shape[1]).sum(dim=(1, 2))
    return LossBatch(
        advantages_BT=our_advantages(objective, rollout),
        mask_BT=mask_BT,
        group_tokens_B=group_tokens_P.repeat_interleave(GROUP_SIZE),
        old_logprobs_BT=rollout.old_logprobs_BT,
        reference_logprobs_BT=rollout.reference_logprobs_BT if objective.needs_reference else None,
        sampler_logprobs_BT=rollout.sampler_logprobs_BT,
        policy_mask_BT=_uncertain(objective, rollout.entropy_BT.detach(), mask_BT),
    )


def _uncertain(objective: Objective, entropy_BT: Tensor, mask_BT: Tensor) -> Tensor | None:
    mask = objective.entropy_mask
    return None if mask is None else entropy_BT >= mask.threshold(entropy_BT[mask_BT])


def _counts(batch: LossBatch) -> MinibatchCounts:
    has_tokens_B = batch.mask_BT.any(dim=1)
    return MinibatchCounts(
        tokens=int(batch.mask_BT.sum()), sequences=int(has_tokens_B.sum()), groups=len(LENGTHS) // GROUP_SIZE
    )

"""From scored groups to the advantage of every token, over all ranks as if they were one.

What is compared over the batch is small, a few numbers per completion. The ranks exchange it, each computes the same
on all of it, and keeps the rows of its own prompts, so that the number of ranks does not enter.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_lightning.functional.returns import suffix_sums
from grpo_lightning.functional.scales import Moments, moments_of_constants, scaled
from grpo_lightning.objective.advantage import Advantage, OutcomeAdvantage, StepAdvantage
from grpo_lightning.objective.regularizer import RewardPenalty
from grpo_lightning.objective.scale import Affine, Scale
from grpo_lightning.types import CompletionTokens, ScoredGroups

Gather = Callable[[Tensor], Tensor]
"""Puts the rows of all ranks under each other. A collective: every rank calls it, with rows of one shape."""


def on_one_rank(rows: Tensor) -> Tensor:
    """The `Gather` of a run on one rank."""
    return rows


@dataclass(frozen=True, kw_only=True)
class AllRanks:
    """The groups of all ranks in the order of their slots, and which of them are this rank's."""

    groups: ScoredGroups
    order_P: Tensor
    """Where each gathered row stands in `groups`."""
    mine_P: Tensor
    """The rows of `groups` that are this rank's."""
    gather: Gather

    @classmethod
    def of(cls, mine: ScoredGroups, gather: Gather) -> "AllRanks":
        """Exchange the groups, in one collective."""
        slots_PG1 = mine.slots_P[:, None, None].expand(*mine.rewards_PG.shape, 1)
        columns = [slots_PG1, mine.valid_PG[..., None], mine.lengths_PG[..., None], mine.rewards_PG[..., None]]
        gathered_PGC = gather(torch.cat([column.double() for column in (*columns, mine.values_PGK)], dim=-1))
        slots_P, order_P = gathered_PGC[:, 0, 0].long().sort()
        everyone_PGC = gathered_PGC[order_P]
        groups = ScoredGroups(
            slots_P=slots_P,
            valid_PG=everyone_PGC[..., 1] > 0,
            lengths_PG=everyone_PGC[..., 2].long(),
            rewards_PG=everyone_PGC[..., 3],
            values_PGK=everyone_PGC[..., 4:],
            weights_K=mine.weights_K,
        )
        return cls(groups=groups, order_P=order_P, mine_P=torch.searchsorted(slots_P, mine.slots_P), gather=gather)

    def gathered(self, rows_PG: Tensor) -> Tensor:
        """More rows of this rank's groups, as rows of `groups`."""
        return self.gather(rows_PG)[self.order_P]


@dataclass(frozen=True, kw_only=True)
class Credit:
    """What rewards are compared with, divided by, and reduced by.

    Args:
        advantage: The comparison.
        scale: None divides by nothing.
        penalty: None takes nothing off.
        coefficient: Of the penalty.
    """

    advantage: Advantage
    scale: Scale | None
    penalty: RewardPenalty | None
    coefficient: float

    def assign(self, groups: ScoredGroups, tokens: CompletionTokens | None, gather: Gather) -> Tensor:
        """See `Objective.advantages`."""
        penalties_BT = self._penalties(tokens)
        ranks = AllRanks.of(self._penalised(groups, penalties_BT), gather)
        if isinstance(self.advantage, OutcomeAdvantage):
            advantages_PG = self.advantage(ranks.groups)
        else:
            advantages_PG = torch.zeros_like(ranks.groups.rewards_PG)
        token_rewards_BT = self._token_rewards(groups, tokens, penalties_BT)
        if token_rewards_BT is None:
            return _of_completions(advantages_PG, self.scale, ranks)
        assert tokens is not None, "there are no rewards of tokens without tokens"
        return _of_tokens(advantages_PG, token_rewards_BT, tokens.mask_BT, self.scale, ranks)

    def _penalties(self, tokens: CompletionTokens | None) -> Tensor | None:
        if self.penalty is None:
            return None
        assert tokens is not None, "a penalty in the reward needs tokens"
        assert tokens.old_logprobs_BT is not None, "a penalty in the reward needs the old policy"
        assert tokens.reference_logprobs_BT is not None, "a penalty in the reward needs a reference"
        kl_BT = self.penalty.estimator(tokens.old_logprobs_BT.double(), tokens.reference_logprobs_BT.double())
        return self.coefficient * kl_BT.masked_fill(~tokens.mask_BT, 0.0)

    def _penalised(self, groups: ScoredGroups, penalties_BT: Tensor | None) -> ScoredGroups:
        if self.penalty is None or penalties_BT is None:
            return groups
        penalties_B = self.penalty.of_completions(penalties_BT)
        if penalties_B is None:
            return groups
        return replace(groups, rewards_PG=groups.rewards_PG - penalties_B.view_as(groups.rewards_PG))

    def _token_rewards(
        self, groups: ScoredGroups, tokens: CompletionTokens | None, penalties_BT: Tensor | None
    ) -> Tensor | None:
        if isinstance(self.advantage, StepAdvantage):
            assert tokens is not None, "step scores need tokens"
            shape_PGT = (*groups.valid_PG.shape, -1)
            is_step_PGT = tokens.is_step_BT.view(shape_PGT) & groups.valid_PG[..., None]
            return self.advantage(tokens.step_scores_BT.view(shape_PGT), is_step_PGT).flatten(0, 1)
        if self.penalty is None or penalties_BT is None:
            return None
        of_tokens_BT = self.penalty.of_tokens(penalties_BT)
        return None if of_tokens_BT is None else -of_tokens_BT


def _of_completions(advantages_PG: Tensor, scale: Scale | None, ranks: AllRanks) -> Tensor:
    """One advantage per completion of this rank, shape [B, 1].

    Args:
        advantages_PG: Of all ranks, before the scale.
        scale: None divides by nothing.
        ranks: Whose advantages they are.
    """
    if scale is not None:
        counts_PG = ranks.groups.lengths_PG * ranks.groups.valid_PG
        affine = scale(ranks.groups, moments_of_constants(advantages_PG, counts_PG))
        advantages_PG = _transformed(advantages_PG, affine).masked_fill(~ranks.groups.valid_PG, 0.0)
    return advantages_PG[ranks.mine_P].reshape(-1, 1)


def _of_tokens(
    advantages_PG: Tensor, token_rewards_BT: Tensor, mask_BT: Tensor, scale: Scale | None, ranks: AllRanks
) -> Tensor:
    """The advantage of every token of this rank's completions, shape [B, T]; 0 outside of `mask_BT`.

    Args:
        advantages_PG: One per completion, of all ranks, before the scale.
        token_rewards_BT: Of this rank: what is credited to a token and those before it, besides.
        mask_BT: bool, the loss tokens of this rank's valid completions.
        scale: None divides by nothing.
        ranks: Whose advantages they are.
    """
    group_size = advantages_PG.shape[1]
    values_BT = advantages_PG[ranks.mine_P].reshape(-1, 1) + suffix_sums(token_rewards_BT)
    if scale is not None:
        moments = Moments(*(ranks.gathered(m_B.view(-1, group_size)) for m_B in _moments(values_BT, mask_BT)))
        affine = Affine(*(part.expand_as(advantages_PG)[ranks.mine_P] for part in scale(ranks.groups, moments)))
        values_BT = _transformed(values_BT, Affine(*(part.reshape(-1, 1) for part in affine)))
    return values_BT.masked_fill(~mask_BT, 0.0)


def _moments(values_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    counts_B = mask_BT.sum(dim=1).to(values_BT.dtype)
    means_B = values_BT.masked_fill(~mask_BT, 0.0).sum(dim=1) / counts_B.clamp(min=1)
    squares_B = (values_BT - means_B[:, None]).masked_fill(~mask_BT, 0.0).square().sum(dim=1)
    return counts_B, means_B, squares_B


def _transformed(values: Tensor, affine: Affine) -> Tensor:
    return scaled(values - affine.shift, affine.divisor)

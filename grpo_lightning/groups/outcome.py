"""What became of a group, in a few numbers that every rank knows of all groups."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_lightning.types import Rewards, Rollout


class GroupOutcome(NamedTuple):
    """A group that an iteration drew, on whichever rank.

    Example: slot 3 drew 8 completions of the prompt 17; one could not be scored, 5 are right, and the group is kept:
    ``GroupOutcome(slot=3, prompt_index=17, num_solved=5, num_scored=7, is_kept=True)``
    """

    slot: int
    prompt_index: int
    num_solved: int
    num_scored: int
    is_kept: bool


def outcome_rows(rollout: Rollout, rewards: Rewards, keep_P: Tensor, *, threshold: float) -> Tensor:
    """The outcomes of one rank's groups as int64 rows, which ranks can exchange.

    Args:
        rollout: Of this rank.
        rewards: Of the rollout.
        keep_P: bool, the groups that are kept.
        threshold: A completion is solved by a total of at least this.
    """
    shape_PG = (len(rollout.prompts), rollout.group_size)
    valid_PG = rewards.valid_B.view(shape_PG)
    solved_PG = (rewards.totals_B >= threshold).view(shape_PG)  # NaN is never
    columns = (
        torch.tensor(rollout.slots),
        torch.tensor([prompt.index for prompt in rollout.prompts]),
        solved_PG.sum(dim=1),
        valid_PG.sum(dim=1),
        keep_P.long(),
    )
    return torch.stack(columns, dim=1)


def outcomes_of(rows: Tensor) -> list[GroupOutcome]:
    """The outcomes that rows of `outcome_rows` stand for, by slot."""
    found: Sequence[list[int]] = rows.tolist()
    return sorted(GroupOutcome(slot, index, solved, scored, bool(kept)) for slot, index, solved, scored, kept in found)

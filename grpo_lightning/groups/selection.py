"""Which of the groups that an iteration drew it looks at, and the places that they take."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from grpo_lightning.groups.outcome import GroupOutcome
from grpo_lightning.types import Rewards, Rollout


class ScoredRollout(NamedTuple):
    """Completions of one rank, and what the rewards say of them."""

    rollout: Rollout
    rewards: Rewards


class Selection(NamedTuple):
    """The groups of an iteration on one rank."""

    selected: ScoredRollout
    """As many groups as an iteration has, the kept ones among them; the same number on every rank."""
    drawn: ScoredRollout
    """Every group that this rank drew, in the slots that it was drawn in."""
    outcomes: tuple[GroupOutcome, ...]
    """Of every group drawn, over all ranks."""
    num_rounds: int
    """How often prompts were drawn."""


def places(outcomes: Sequence[GroupOutcome], *, num_prompts: int, num_minibatches: int) -> dict[int, int]:
    """From the slot that a selected group was drawn in to the slot that it takes.

    The kept groups come first, in the order of their slots, as many as fit. Where they are fewer than an iteration
    has, each minibatch gets an equal share of them, and groups that are not kept take the places that are left: they
    have no share in the loss.

    Args:
        outcomes: Of all groups, over all ranks, at least `num_prompts`.
        num_prompts: Of an iteration, over all ranks.
        num_minibatches: Slot s belongs to minibatch ``s // (num_prompts / num_minibatches)``.

    Example: four prompts in two minibatches; of six groups, those drawn in slots 1 and 5 are kept.
        >>> groups = [GroupOutcome(s, s, 0, 2, is_kept=s in (1, 5)) for s in range(6)]
        >>> places(groups, num_prompts=4, num_minibatches=2)
        {1: 0, 5: 2, 0: 1, 2: 3}
    """
    kept = [outcome.slot for outcome in outcomes if outcome.is_kept][:num_prompts]
    others = [outcome.slot for outcome in outcomes if not outcome.is_kept]
    per_minibatch = num_prompts // num_minibatches
    next_place = [m * per_minibatch for m in range(num_minibatches)]
    taken: dict[int, int] = {}
    for j, slot in enumerate(kept):
        m = j * num_minibatches // len(kept)
        taken[slot] = next_place[m]
        next_place[m] += 1
    free = sorted(set(range(num_prompts)) - set(taken.values()))
    return taken | dict(zip(others, free, strict=False))


def select(
    drawn: ScoredRollout,
    place_of_slot: dict[int, int],
    *,
    rank: int,
    num_ranks: int,
    exchange: Callable[[list[ScoredRollout]], list[list[ScoredRollout]]],
) -> ScoredRollout:
    """The selected groups that this rank looks at: slots are dealt out to the ranks in turn.

    Args:
        drawn: Every group that this rank drew.
        place_of_slot: See `places`.
        rank: Of this process.
        num_ranks: Of the run.
        exchange: A collective: from this rank's groups to those of each rank.
    """
    groups = [
        group_at(drawn, p, slot=place_of_slot[slot])
        for p, slot in enumerate(drawn.rollout.slots)
        if slot in place_of_slot
    ]
    mine = [g for of_rank in exchange(groups) for g in of_rank if g.rollout.slots[0] % num_ranks == rank]
    return joined(sorted(mine, key=lambda group: group.rollout.slots))


def group_at(scored: ScoredRollout, p: int, *, slot: int) -> ScoredRollout:
    """The p-th group by itself, in another slot."""
    rollout, rewards = scored
    own = slice(p * rollout.group_size, (p + 1) * rollout.group_size)
    return ScoredRollout(
        replace(
            rollout, slots=(slot,), prompts=rollout.prompts[p : p + 1], completions=tuple(rollout.completions[own])
        ),
        replace(
            rewards,
            values_BK=rewards.values_BK[own],
            failed_BK=rewards.failed_BK[own],
            steps={name: tuple(steps[own]) for name, steps in rewards.steps.items()},
        ),
    )


def joined(parts: Sequence[ScoredRollout]) -> ScoredRollout:
    """One rollout with the groups of all parts, at least one, in their order."""
    rollouts, rewards = zip(*parts, strict=True)
    names = dict.fromkeys(name for reward in rewards for name in reward.steps)
    return ScoredRollout(
        replace(
            rollouts[0],
            slots=tuple(slot for rollout in rollouts for slot in rollout.slots),
            prompts=tuple(prompt for rollout in rollouts for prompt in rollout.prompts),
            completions=tuple(completion for rollout in rollouts for completion in rollout.completions),
        ),
        replace(
            rewards[0],
            values_BK=torch.cat([reward.values_BK for reward in rewards]),
            failed_BK=torch.cat([reward.failed_BK for reward in rewards]),
            steps={
                name: tuple(s for r in rewards for s in r.steps.get(name, [None] * len(r.values_BK))) for name in names
            },
        ),
    )

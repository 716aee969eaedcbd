"""Rounds of drawing: bounded, agreed on over ranks, and never the end of the run."""

from itertools import count

import pytest
import torch

from grpo_lightning.groups import DropZeroVariance, DynamicSampling, GroupOutcome, Refill, ScoredRollout
from grpo_lightning.groups.selection import group_at, joined, places
from grpo_lightning.types import Completion, ConfigurationError, FinishReason, Prompt, Rewards, Rollout, StepScores

MIXED, SOLVED, HOPELESS = (1.0, 0.0), (1.0, 1.0), (0.0, 0.0)


def scored(slots, kinds, steps=False):
    """Groups of two; the prompt in slot s has the index 100 + s, its completions the tokens (s, 0) and (s, 1)."""
    values = torch.tensor([value for kind in kinds for value in kind], dtype=torch.float64)[:, None]
    completions = tuple(
        Completion(token_ids=(s, g), sampler_logprobs=(0.0, 0.0), text="", finish_reason=FinishReason.EOS)
        for s in slots
        for g in range(2)
    )
    return ScoredRollout(
        Rollout(
            iteration=4,
            slots=tuple(slots),
            prompts=tuple(Prompt(index=100 + s, token_ids=(s,), text="") for s in slots),
            completions=completions,
        ),
        Rewards(
            names=("r",),
            weights=(1.0,),
            values_BK=values,
            failed_BK=torch.zeros_like(values, dtype=torch.bool),
            steps={"r": tuple(StepScores((float(v),), (1,)) for v in values)} if steps else {},
        ),
    )


def refill(rounds, *, max_rounds=9, groups=None, num_minibatches=1):
    """The selection of four prompts, on one rank, where the rounds after the first are drawn from `rounds`."""
    first, *later = rounds
    asked, numbers = [], count(1)

    def draw(indices, first_slot):
        asked.append((indices, first_slot))
        i = next(numbers)
        return scored(range(4 * i, 4 * i + 4), later[i - 1]) if i <= len(later) else None

    selection = Refill(
        groups=groups or DynamicSampling(max_rounds=max_rounds),
        num_prompts=4,
        num_minibatches=num_minibatches,
        threshold=1.0,
        rank=0,
        num_ranks=1,
        gather=lambda rows: rows,
        exchange=lambda own: [own],
        draw=draw,
    ).select(scored(range(4), first))
    return selection, asked


def chosen(selection):
    """From the place that a group takes to the slot that it was drawn in."""
    rollout = selection.selected.rollout
    return {slot: prompt.index - 100 for slot, prompt in zip(rollout.slots, rollout.prompts, strict=True)}


def test_a_full_iteration_is_left_as_it_is():
    selection, asked = refill([[MIXED] * 4])
    assert asked == []
    assert chosen(selection) == {0: 0, 1: 1, 2: 2, 3: 3}
    assert selection.num_rounds == 1


def test_rounds_go_on_until_there_are_enough_groups():
    rounds = [[MIXED, SOLVED, HOPELESS, SOLVED], [SOLVED, MIXED, SOLVED, SOLVED], [MIXED] * 4, [MIXED] * 4]
    selection, asked = refill(rounds)
    assert selection.num_rounds == 3
    # Slots 0 and 5 of the first two rounds, then the first two of the third; the others are thrown away.
    assert chosen(selection) == {0: 0, 1: 5, 2: 8, 3: 9}
    assert asked == [({100, 101, 102, 103}, 4), ({*range(100, 108)}, 8)]


@pytest.mark.parametrize("kind", [SOLVED, HOPELESS])
def test_where_everything_is_solved_or_hopeless_the_rounds_end(kind):
    selection, asked = refill([[kind] * 4] * 20, max_rounds=3)
    assert len(asked) == 2
    assert selection.num_rounds == 3
    assert chosen(selection) == {0: 0, 1: 1, 2: 2, 3: 3}
    assert not any(outcome.is_kept for outcome in selection.outcomes)


def test_where_no_other_prompts_are_left_the_rounds_end():
    selection, asked = refill([[SOLVED] * 4, [SOLVED, SOLVED, MIXED, SOLVED]])
    assert len(asked) == 2  # the second time there was none
    assert selection.num_rounds == 2
    assert chosen(selection)[0] == 6


def test_a_filter_without_refill_draws_once():
    selection, asked = refill([[SOLVED] * 4] * 3, groups=DropZeroVariance())
    assert asked == []
    assert [outcome.is_kept for outcome in selection.outcomes] == [False] * 4


def test_what_was_drawn_is_all_there():
    selection, _ = refill([[SOLVED] * 4, [MIXED] * 4])
    assert selection.drawn.rollout.slots == tuple(range(8))
    assert selection.drawn.rewards.totals_B.tolist() == [1.0] * 8 + [1.0, 0.0] * 4
    assert selection.outcomes[0] == GroupOutcome(0, 100, num_solved=2, num_scored=2, is_kept=False)
    assert selection.outcomes[7] == GroupOutcome(7, 107, num_solved=1, num_scored=2, is_kept=True)


def test_completions_and_rewards_move_with_their_group():
    selection, _ = refill([[SOLVED] * 4, [MIXED] * 4])
    rollout, rewards = selection.selected
    assert [c.token_ids for c in rollout.completions] == [(s, g) for s in range(4, 8) for g in range(2)]
    assert rewards.values_BK.flatten().tolist() == [1.0, 0.0] * 4
    assert rollout.iteration == 4


def test_too_few_groups_are_spread_over_the_minibatches():
    # Kept: 2, 3 and 5. Two minibatches of two places: 0 * 2 // 3 = 0, 1 * 2 // 3 = 0, 2 * 2 // 3 = 1.
    kept = (2, 3, 5)
    outcomes = [GroupOutcome(s, s, 0, 2, is_kept=s in kept) for s in range(8)]
    assert places(outcomes, num_prompts=4, num_minibatches=2) == {2: 0, 3: 1, 5: 2, 0: 3}


@pytest.mark.parametrize("num_kept", range(13))
def test_every_place_is_taken_once_and_the_minibatches_are_even(num_kept):
    outcomes = [GroupOutcome(s, s, 0, 2, is_kept=s >= 16 - num_kept) for s in range(16)]
    taken = places(outcomes, num_prompts=8, num_minibatches=4)
    assert sorted(taken.values()) == list(range(8))
    kept = [place // 2 for slot, place in taken.items() if slot >= 16 - num_kept]
    shares = [kept.count(m) for m in range(4)]
    assert sum(shares) == min(num_kept, 8)
    assert max(shares) - min(shares) <= 1


def test_ranks_select_what_one_would():
    rounds = [[MIXED, SOLVED, HOPELESS, SOLVED], [SOLVED, MIXED, MIXED, MIXED]]
    whole, _ = refill(rounds)
    drawn = [joined([scored([s for s in range(4) if s % 2 == rank], rounds[0][rank::2])]) for rank in range(2)]
    more = [scored([s for s in range(4, 8) if s % 2 == rank], rounds[1][rank::2]) for rank in range(2)]
    sent, got = {}, {}
    for _ in range(2):  # the first time to hear what every rank sends, the second time to hand it out
        for rank in range(2):

            def exchange(own, rank=rank):
                sent[rank] = own
                return [sent.get(r, []) for r in range(2)]

            def gather(rows, rank=rank):
                parts = drawn if int(rows[0, 0]) < 4 else more
                kinds = [
                    DynamicSampling().keep(p.rewards.totals_B.view(2, 2), p.rewards.valid_B.view(2, 2)) for p in parts
                ]
                both = [
                    [[*p.rollout.slots][i], 100 + p.rollout.slots[i], 0, 2, int(k[i])]
                    for p, k in zip(parts, kinds, strict=True)
                    for i in range(2)
                ]
                return torch.tensor(both)

            got[rank] = Refill(
                groups=DynamicSampling(),
                num_prompts=4,
                num_minibatches=1,
                threshold=1.0,
                rank=rank,
                num_ranks=2,
                gather=gather,
                exchange=exchange,
                draw=lambda indices, first_slot, rank=rank: more[rank],
            ).select(drawn[rank])
    assert {**chosen(got[0]), **chosen(got[1])} == chosen(whole)
    assert [len(got[rank].selected.rollout.slots) for rank in range(2)] == [2, 2]
    assert all(slot % 2 == rank for rank in range(2) for slot in got[rank].selected.rollout.slots)


def test_step_scores_move_with_their_group_also_where_only_one_round_has_them():
    whole = joined([scored([0], [MIXED]), scored([1], [SOLVED], steps=True)])
    assert whole.rewards.steps == {"r": (None, None, StepScores((1.0,), (1,)), StepScores((1.0,), (1,)))}
    assert group_at(whole, 1, slot=9).rewards.steps == {"r": (StepScores((1.0,), (1,)),) * 2}


def test_a_number_of_rounds_below_one_is_refused():
    with pytest.raises(ConfigurationError, match=r"model\.groups\.max_rounds must be >= 1, got 0"):
        DynamicSampling(max_rounds=0)

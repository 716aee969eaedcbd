"""Advantages of a whole iteration: scales, rewards of tokens, and ranks."""

import pytest
import torch
from objective_cases import NAN, scored

from grpo_lightning.objective import (
    K1,
    AdvantageStd,
    BatchStd,
    Clipped,
    GroupMean,
    GroupMeanReward,
    GroupStd,
    KLInReturn,
    KLInReward,
    LeaveOneOut,
    NoBaseline,
    Objective,
    PerReward,
    ProcessSupervision,
    SignalShare,
    TokenMean,
    TokenRatio,
    TokenWhitened,
    Whitened,
)
from grpo_lightning.types import Coefficients, CompletionTokens, ConfigurationError, ScoredGroups

REWARDS = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [2.0, 0.0, 1.0, NAN]]
LENGTHS = [[1, 2, 3, 4], [1, 1, 1, 1], [4, 1, 2, 3]]


def objective(advantage, scale, kl=None):
    return Objective(
        advantage=advantage,
        scale=scale,
        ratio=TokenRatio(),
        surrogate=Clipped(clip_low=0.2, clip_high=0.2),
        aggregation=TokenMean(),
        kl=kl,
    )


def advantages(advantage, scale, groups):
    made = objective(advantage, scale)
    return made.advantages(groups, made.coefficients).view_as(groups.rewards_PG)


def close(got, want, atol=1e-14):
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=atol)


def test_scales_of_totals_by_hand():
    groups = scored(REWARDS, lengths=LENGTHS)
    centred = [[0.75, -0.25, -0.25, -0.25], [0, 0, 0, 0], [1, -1, 0, 0]]
    close(advantages(GroupMean(), None, groups), centred)
    # Sample deviations 1/2, 0 and 1.
    std = advantages(GroupMean(), GroupStd(ddof=1, epsilon=0.0), groups)
    close(std, [[1.5, -0.5, -0.5, -0.5], [0, 0, 0, 0], [1, -1, 0, 0]])
    # Group means 1/4, 1 and 1.
    close(advantages(GroupMean(), GroupMeanReward(), groups), [[3, -1, -1, -1], [0, 0, 0, 0], [1, -1, 0, 0]])
    # 7 of 11 completions are in groups with a signal.
    close(advantages(GroupMean(), SignalShare(), groups), (torch.tensor(centred) * 11 / 7).tolist(), atol=1e-7)
    # Eleven rewards of sum 8 and sum of squares 10.
    deviation = (10 / 11 - (8 / 11) ** 2) ** 0.5
    got = advantages(GroupMean(), BatchStd(ddof=0, epsilon=0.0), groups)
    close(got, (torch.tensor(centred, dtype=torch.float64) / deviation).tolist())


def test_scales_of_advantages_have_their_moments():
    groups = scored(REWARDS, lengths=LENGTHS)
    valid = groups.valid_PG
    divided = advantages(GroupMean(), AdvantageStd(ddof=0, epsilon=0.0), groups)
    close(divided[valid].std(correction=0), 1.0)
    assert divided[1].tolist() == [0.0] * 4
    whitened = advantages(NoBaseline(), Whitened(ddof=1, epsilon=0.0), groups)
    close(whitened[valid].mean(), 0.0)
    close(whitened[valid].std(), 1.0)
    by_token = advantages(NoBaseline(), TokenWhitened(ddof=0, epsilon=0.0), groups)
    tokens = torch.repeat_interleave(by_token[valid], groups.lengths_PG[valid])
    close(tokens.mean(), 0.0)
    close(tokens.std(correction=0), 1.0)
    assert by_token[2, 3] == whitened[2, 3] == 0


@pytest.mark.parametrize("scale", [GroupStd, BatchStd, AdvantageStd, Whitened, TokenWhitened])
def test_equal_rewards_everywhere_give_zero(scale):
    groups = scored([[0.1] * 3, [0.1] * 3])
    assert advantages(GroupMean(), scale(ddof=0, epsilon=0.0), groups).abs().max() == 0


def test_a_negative_reward_cannot_be_divided_by():
    with pytest.raises(ConfigurationError, match=r"model\.objective\.scale: GroupMeanReward"):
        advantages(GroupMean(), GroupMeanReward(), scored([[1.0, -1.0]]))


def completion_tokens(groups, seed=0):
    """Three or fewer tokens per completion; steps at some of them."""
    generator = torch.Generator().manual_seed(seed)
    mask_BT = (torch.arange(4) < groups.lengths_PG.view(-1, 1)) & groups.valid_PG.view(-1, 1)
    random = torch.randn(3, *mask_BT.shape, dtype=torch.float64, generator=generator)
    is_step_BT = (torch.rand(mask_BT.shape, generator=generator) < 0.5) & mask_BT
    return CompletionTokens(
        mask_BT=mask_BT,
        step_scores_BT=random[0] * is_step_BT,
        is_step_BT=is_step_BT,
        old_logprobs_BT=random[1],
        reference_logprobs_BT=random[2],
    )


def test_a_penalty_in_the_reward_is_taken_off_before_the_baseline():
    groups = scored([[1.0, 0.0]], lengths=[[2, 1]])
    tokens = CompletionTokens(
        mask_BT=torch.tensor([[True, True], [True, False]]),
        step_scores_BT=torch.zeros(2, 2),
        is_step_BT=torch.zeros(2, 2, dtype=torch.bool),
        old_logprobs_BT=torch.tensor([[-1.0, -1.0], [-2.0, 9.0]]),
        reference_logprobs_BT=torch.tensor([[-1.5, -2.0], [-1.0, -9.0]]),
    )
    made = objective(LeaveOneOut(), None, KLInReward(coefficient=9.0, estimator=K1()))
    # k1 sums to 0.5 + 1 and to -1; with a coefficient of 0.1 the totals are 0.85 and 0.1.
    got = made.advantages(groups, Coefficients(kl=0.1, entropy=0.0), tokens=tokens)
    close(got, [[0.75], [-0.75]])
    made = objective(LeaveOneOut(), None, KLInReturn(coefficient=9.0, estimator=K1()))
    # After the baseline, of the token and of what follows: 1 - 0.15, 1 - 0.1 and -1 + 0.1.
    got = made.advantages(groups, Coefficients(kl=0.1, entropy=0.0), tokens=tokens)
    close(got, [[0.85, 0.9], [-0.9, 0.0]])


def test_returns_are_whitened_over_their_tokens():
    groups = scored(REWARDS, lengths=LENGTHS)
    tokens = completion_tokens(groups)
    made = objective(NoBaseline(), TokenWhitened(ddof=0, epsilon=0.0), KLInReturn(coefficient=0.3, estimator=K1()))
    got = made.advantages(groups, made.coefficients, tokens=tokens)
    raw = objective(NoBaseline(), None, KLInReturn(coefficient=0.3, estimator=K1()))
    returns = raw.advantages(groups, raw.coefficients, tokens=tokens)[tokens.mask_BT]
    want = (returns - returns.mean()) / returns.std(correction=0)
    torch.testing.assert_close(got[tokens.mask_BT], want, rtol=0, atol=1e-13)
    assert got[~tokens.mask_BT].abs().max() == 0


def test_one_step_at_the_last_token_is_outcome_supervision():
    groups = scored(REWARDS, lengths=LENGTHS)
    mask_BT = (torch.arange(4) < groups.lengths_PG.view(-1, 1)) & groups.valid_PG.view(-1, 1)
    is_last_BT = torch.arange(4) == groups.lengths_PG.view(-1, 1) - 1
    tokens = CompletionTokens(
        mask_BT=mask_BT,
        step_scores_BT=groups.rewards_PG.nan_to_num().view(-1, 1) * is_last_BT,
        is_step_BT=is_last_BT,
        old_logprobs_BT=None,
        reference_logprobs_BT=None,
    )
    steps = objective(ProcessSupervision(ddof=1, epsilon=1e-6), None)
    outcome = objective(GroupMean(), GroupStd(ddof=1, epsilon=1e-6))
    got = steps.advantages(groups, steps.coefficients, tokens=tokens)
    want = outcome.advantages(groups, outcome.coefficients).expand_as(got) * mask_BT
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


def share_of(groups, rank, ranks):
    mine = groups.slots_P % ranks == rank
    return ScoredGroups(
        **{name: value if name == "weights_K" else value[mine] for name, value in vars(groups).items()}
    ), mine


EVERY = {
    "group std": (GroupMean(), GroupStd(ddof=1, epsilon=1e-6), None),
    "batch std": (LeaveOneOut(), BatchStd(ddof=1, epsilon=1e-6), None),
    "per reward": (PerReward(ddof=1, epsilon=1e-6), Whitened(ddof=1, epsilon=1e-6), None),
    "share": (GroupMean(), SignalShare(), None),
    "returns": (NoBaseline(), TokenWhitened(ddof=1, epsilon=0.0), KLInReturn(coefficient=0.2, estimator=K1())),
    "reward": (LeaveOneOut(), AdvantageStd(ddof=0, epsilon=0.0), KLInReward(coefficient=0.2, estimator=K1())),
    "steps": (ProcessSupervision(ddof=0, epsilon=1e-6), Whitened(ddof=0, epsilon=1e-6), None),
}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("case", EVERY.values(), ids=EVERY)
def test_ranks_compute_what_one_rank_computes_to_the_last_bit(case, ranks):
    rewards = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rewards[4, 1] = NAN
    lengths = torch.randint(1, 5, (6, 4), generator=torch.Generator().manual_seed(2)).tolist()
    groups = scored(rewards.tolist(), lengths=lengths)
    made, tokens = objective(*case), completion_tokens(groups)
    want = made.advantages(groups, made.coefficients, tokens=tokens).view(6, 4, -1)

    # A collective needs every rank at once: the first pass notes what each rank sends, the second one answers.
    sent = [[] for _ in range(ranks)]
    for is_second in (False, True):
        for rank in range(ranks):
            mine, rows = share_of(groups, rank, ranks)
            rows_B = rows.repeat_interleave(4)
            calls = iter(range(9))

            def gather(part, rank=rank, calls=calls, is_second=is_second):
                call = next(calls)
                if not is_second:
                    sent[rank].append(part)
                    return part
                return torch.cat([sent[r][call] if r != rank else part for r in range(ranks)])

            my_tokens = CompletionTokens(*(None if part is None else part[rows_B] for part in tokens))
            got = made.advantages(mine, made.coefficients, tokens=my_tokens, gather=gather)
            if is_second:
                assert torch.equal(got.view(len(mine.slots_P), 4, -1), want[rows])

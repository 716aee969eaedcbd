"""Where the objective differs from TRL 1.16 on purpose: both formulas, the exact relation, and that it is one.

Symbols: v value of a token, n_m loss tokens of micro-batch m, N those of the minibatch, B completions, B' those with
loss tokens, G the group's size.
"""

import math

import pytest
import torch

from grpo_lightning.functional.kl import k3
from grpo_lightning.functional.ratios import sequence_mean
from grpo_lightning.objective import (
    K3,
    ConstantLength,
    EntropyBonus,
    GeometricRatio,
    GroupStd,
    OffPolicySequences,
    SequenceMeanTokenMean,
    SequenceSum,
    TokenMean,
    TopEntropyTokens,
    TruncatedCompletions,
    TwoSidedClipped,
    WeightedKLInLoss,
)
from grpo_lightning.types import ConfigurationError
from peers.expectations import CLIPS, TOLERANCE, assert_distinct, assert_same, objective
from peers.our_objective import loss_by_itself, our_advantages, our_outcome
from peers.rollout import GROUP_SIZE, LENGTHS, MAX_LENGTH, Outcome, recorded_rollout


@pytest.fixture
def rollout():
    return recorded_rollout()


def test_the_deviation_of_a_group_may_be_the_populations(trl, rollout):
    """TRL: (r - mean)/(s_1 + 1e-4), s_1 of the sample. Ours also: (r - mean)/(s_0 + epsilon), s_1 = s_0 √(G/(G-1))."""
    ours_PG = our_advantages(objective(scale=GroupStd(ddof=0, epsilon=0.0)), rollout).view(-1, GROUP_SIZE)
    std_P1 = rollout.rewards_BK.view(-1, GROUP_SIZE).std(dim=1, correction=0, keepdim=True)
    factor_P1 = std_P1 / (std_P1 * math.sqrt(GROUP_SIZE / (GROUP_SIZE - 1)) + 1e-4)
    torch.testing.assert_close(trl.advantages(rollout), (factor_P1 * ours_PG).flatten(), rtol=0, atol=TOLERANCE)
    assert (factor_P1 < 0.9).all()


def test_bnpo_divides_by_the_tokens_of_a_microbatch(trl, rollout):
    """TRL: 1/M Σ_m (Σ_{i in m} v / n_m), which depends on the split. Ours, `TokenMean`: Σ v / N, which does not."""
    peer = trl.outcome(rollout, loss_type="bnpo", num_microbatches=4, **CLIPS)
    parts = [loss_by_itself(objective(), rollout, rows) for rows in peer.microbatches]
    assert_same(peer, Outcome.of(torch.stack(parts).mean(), rollout, peer.microbatches))
    assert_distinct(peer, our_outcome(objective(), rollout, microbatches=peer.microbatches))


AVERAGED = {
    "grpo": SequenceMeanTokenMean(),
    "dr_grpo": ConstantLength(length=MAX_LENGTH),
    "luspo": SequenceSum(),
}


@pytest.mark.parametrize("loss_type", AVERAGED)
def test_masked_completions_are_not_counted(trl, rollout, loss_type):
    """TRL: Σ_i v_i / B, so that what is masked still thins out the rest. Ours: Σ_i v_i / B'."""
    peer = trl.outcome(rollout, loss_type=loss_type, mask_truncated_completions=True, **CLIPS)
    ours = objective(aggregation=AVERAGED[loss_type], masks=(TruncatedCompletions(),))
    num_kept = int((~rollout.is_truncated_B).sum())
    assert num_kept < len(LENGTHS)
    assert_same(peer, our_outcome(ours, rollout), factor=num_kept / len(LENGTHS))


def test_each_minibatch_of_a_rollout_counts_its_own_tokens(trl, rollout):
    """TRL's dapo, S updates of one rollout: Σ v / (N/S), the mean of their counts. Ours: Σ v / n of the update."""
    peer = trl.outcome(rollout, loss_type="dapo", steps_per_generation=2, **CLIPS)
    (rows,) = peer.microbatches
    num_tokens = sum(LENGTHS[row] for row in rows)
    ours = Outcome.of(loss_by_itself(objective(), rollout, rows), rollout, peer.microbatches)
    assert num_tokens != sum(LENGTHS) / 2
    assert_same(peer, ours, factor=num_tokens / (sum(LENGTHS) / 2))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_most_uncertain_tokens_are_counted_upwards(trl, rollout, share):
    """Of N tokens TRL keeps 1 + floor(share (N - 1)), those from the interpolated quantile on; ours ceil(share N)."""
    count = sum(LENGTHS)
    num_theirs, num_ours = 1 + math.floor(share * (count - 1)), math.ceil(share * count)
    peer = trl.outcome(rollout, loss_type="dapo", top_entropy_quantile=share, **CLIPS)
    assert_same(peer, our_outcome(objective(masks=(TopEntropyTokens(share=num_theirs / count),)), rollout))
    assert [num_theirs, num_ours] == {0.2: [6, 6], 0.5: [15, 15], 0.8: [23, 24]}[share]  # N = 29
    ours = our_outcome(objective(masks=(TopEntropyTokens(share=share),)), rollout)
    assert ((ours.gradient_BT != peer.gradient_BT).any()) == (num_theirs != num_ours)


def test_the_most_uncertain_tokens_are_those_of_the_whole_minibatch(trl, rollout):
    """TRL ranks the tokens of a micro-batch; ours those of the minibatch."""
    masks = (TopEntropyTokens(share=0.2),)
    peer = trl.outcome(rollout, loss_type="dapo", top_entropy_quantile=0.2, num_microbatches=2, **CLIPS)
    assert_distinct(peer, our_outcome(objective(masks=masks), rollout, microbatches=peer.microbatches))


def test_a_weighted_kl_is_weighted_by_the_ratio_of_the_token(trl, rollout):
    """TRL at the level of completions: s_i k3, s_i the geometric mean. Ours: rho_t k3, whose gradient is known."""
    level = {"loss_type": "grpo", "importance_sampling_level": "sequence", **CLIPS}
    parts = {"ratio": GeometricRatio(), "aggregation": SequenceMeanTokenMean()}
    peer = trl.outcome(rollout, beta=0.3, use_bias_correction_kl=True, **level)
    log_ratios_BT = rollout.logprobs_BT - rollout.old_logprobs_BT
    theirs_BT = sequence_mean(log_ratios_BT, rollout.mask_BT).exp() * k3(
        rollout.logprobs_BT, rollout.reference_logprobs_BT
    )
    penalty = 0.3 * ((theirs_BT * rollout.mask_BT).sum(dim=1) / rollout.mask_BT.sum(dim=1)).mean()
    policy = loss_by_itself(objective(**parts), rollout, torch.arange(len(LENGTHS)))
    assert_same(peer, Outcome.of(policy + penalty, rollout, []))
    ours = objective(**parts, kl=WeightedKLInLoss(coefficient=0.3, estimator=K3()))
    assert_distinct(peer, our_outcome(ours, rollout))


def test_the_entropy_bonus_is_aggregated_like_the_rest(trl, rollout):
    """TRL: a token mean beside any `loss_type`. Ours: in the objective of each token, under the same aggregation."""
    parts = {"aggregation": SequenceMeanTokenMean()}
    peer = trl.outcome(rollout, loss_type="grpo", entropy_coef=0.1, **CLIPS)
    policy = loss_by_itself(objective(**parts), rollout, torch.arange(len(LENGTHS)))
    bonus = 0.1 * rollout.entropy_BT[rollout.mask_BT].mean()
    assert_same(peer, Outcome.of(policy - bonus, rollout, []))
    assert_distinct(peer, our_outcome(objective(**parts, entropy=EntropyBonus(coefficient=0.1)), rollout))


def test_the_off_policy_mask_asks_the_sampler(trl):
    """TRL without the sampler's log-probabilities takes the old ones for them. Ours asks the sampler in every case."""
    rollout = recorded_rollout(sampler_logprobs_BT=None)
    peer = trl.outcome(rollout, loss_type="dapo", off_policy_mask_threshold=0.15, **CLIPS)
    ours = objective(masks=(OffPolicySequences(max_drift=0.15),), aggregation=TokenMean())
    assert_same(peer, our_outcome(ours, recorded_rollout(sampler_logprobs_BT=rollout.old_logprobs_BT)))
    assert_distinct(peer, our_outcome(ours, recorded_rollout()))


def test_a_second_bound_below_the_clip_is_refused(trl, rollout):
    """TRL takes min(rho, delta) also where delta < 1 + epsilon_high, which moves the clip; ours says so."""
    assert math.isfinite(trl.outcome(rollout, loss_type="dapo", delta=1.2, **CLIPS).loss)
    with pytest.raises(ConfigurationError, match="delta"):
        TwoSidedClipped(clip_low=0.1, clip_high=0.3, delta=1.2)

"""The objective and TRL 1.16's `GRPOTrainer` are the same function of the same tensors, setting by setting.

TRL computes rewards, advantages, masks and losses with its own code (see `trl_trainer`). Loss and gradient agree for
every `loss_type` and `importance_sampling_level`, `beta` and `use_bias_correction_kl`, `epsilon`, `epsilon_high`,
`delta`, `top_entropy_quantile`, `off_policy_mask_threshold`, the sampler's correction, `entropy_coef`,
`mask_truncated_completions`, one update per rollout and several, and any number of micro-batches; advantages agree for
every `scale_rewards` and `multi_objective_aggregation`. Where the two differ on purpose, `test_trl_differences` states
both formulas. What TRL has and the objective cannot say:

* `vllm_importance_sampling_clip_min` with a `*_truncate` mode raises small weights to a bound. No source asks for that,
  and it gives improbable completions a weight that they do not have; `MaskedWeights` leaves them out.
* VESPO with a bounded weight of the sampler inside of its completion ratio. `Bypass` is the unbounded one.
* The adaptive entropy coefficient and MoE's balancing loss, which are no functions of these tensors: the first is a
  controller of the run, the second the model's own loss.
"""

import pytest
import torch

from grpo_lightning.objective import (
    K3,
    BatchStd,
    Bypass,
    Cispo,
    Clipped,
    ConstantLength,
    EntropyBonus,
    GeometricRatio,
    GroupStd,
    KLInLoss,
    MaskedWeights,
    OffPolicySequences,
    PerReward,
    ProductRatio,
    Sapo,
    SequenceMeanTokenMean,
    SequenceSum,
    TokenMean,
    TokenRatio,
    TopEntropyTokens,
    TruncatedCompletions,
    TruncatedWeights,
    TwoSidedClipped,
    Vespo,
    WeightedKLInLoss,
    Whitened,
)
from peers.expectations import CLIPS, TOLERANCE, assert_distinct, assert_same, objective
from peers.our_objective import our_advantages, our_outcome
from peers.rollout import MAX_LENGTH, recorded_rollout

NAN = float("nan")
CLIPPED = Clipped(clip_low=0.1, clip_high=0.3)
CAPPED = {"epsilon_high": 1.3}
"""For TRL's CISPO, `epsilon_high` is the largest ratio itself, as `ratio_cap` is."""
SAPO = Sapo(temperature_positive=1.0, temperature_negative=1.05)
VESPO = Vespo(power_positive=2.0, rate_positive=3.0, power_negative=3.0, rate_negative=2.0)

LOSSES = {
    "grpo": (CLIPS, CLIPPED, SequenceMeanTokenMean()),
    "bnpo": (CLIPS, CLIPPED, TokenMean()),
    "dr_grpo": (CLIPS, CLIPPED, ConstantLength(length=MAX_LENGTH)),
    "dapo": (CLIPS, CLIPPED, TokenMean()),
    "luspo": (CLIPS, CLIPPED, SequenceSum()),
    "cispo": (CAPPED, Cispo(ratio_cap=1.3), TokenMean()),
    "sapo": ({}, SAPO, SequenceMeanTokenMean()),
    "vespo": ({}, VESPO, TokenMean()),
}
LEVELS = {"token": TokenRatio(), "sequence": GeometricRatio()}
KL = {
    "no_kl": ({"beta": 0.0}, None),
    "k3": ({"beta": 0.3, "use_bias_correction_kl": False}, KLInLoss(coefficient=0.3, estimator=K3())),
    "weighted_k3": (
        {"beta": 0.3, "use_bias_correction_kl": True},
        WeightedKLInLoss(coefficient=0.3, estimator=K3()),
    ),
}


def correction(mode: str, upper: float | None, lower: float | None = None) -> dict:
    return {
        "corrects_sampler": True,
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_max": upper,
        "vllm_importance_sampling_clip_min": lower,
    }


OPTIONS = {
    "two-sided": ({"delta": 1.5}, {"surrogate": TwoSidedClipped(clip_low=0.1, clip_high=0.3, delta=1.5)}),
    "top entropy": ({"top_entropy_quantile": 0.2}, {"masks": (TopEntropyTokens(share=0.2),)}),
    "off-policy mask": ({"off_policy_mask_threshold": 0.1}, {"masks": (OffPolicySequences(max_drift=0.1),)}),
    "truncated completions": ({"mask_truncated_completions": True}, {"masks": (TruncatedCompletions(),)}),
    "truncated tokens": (
        correction("token_truncate", 1.1),
        {"correction": TruncatedWeights(weight=TokenRatio(), upper=1.1)},
    ),
    "masked tokens": (
        correction("token_mask", 1.1, 0.9),
        {"correction": MaskedWeights(weight=TokenRatio(), gate=TokenRatio(), lower=0.9, upper=1.1)},
    ),
    "truncated sequences": (
        correction("sequence_truncate", 1.1),
        {"correction": TruncatedWeights(weight=ProductRatio(), upper=1.1)},
    ),
    "masked sequences": (
        correction("sequence_mask", 1.1, 0.9),
        {"correction": MaskedWeights(weight=ProductRatio(), gate=ProductRatio(), lower=0.9, upper=1.1)},
    ),
    "entropy bonus": ({"entropy_coef": 0.1}, {"entropy": EntropyBonus(coefficient=0.1)}),
}


@pytest.fixture
def rollout():
    return recorded_rollout()


def ratio_of(loss_type, level):
    return ProductRatio() if loss_type == "vespo" else LEVELS[level]


# bnpo depends on the split, on purpose of TRL: test_bnpo_divides_by_the_tokens_of_a_microbatch
SPLITS = [(name, count) for name in LOSSES for count in (1, 2, 4) if name != "bnpo" or count == 1]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("loss_type", "num_microbatches"), SPLITS)
def test_every_loss_type_at_every_level(trl, rollout, loss_type, num_microbatches, level):
    settings, surrogate, aggregation = LOSSES[loss_type]
    peer = trl.outcome(
        rollout,
        loss_type=loss_type,
        importance_sampling_level=level,
        num_microbatches=num_microbatches,
        **settings,
    )
    ours = objective(ratio=ratio_of(loss_type, level), surrogate=surrogate, aggregation=aggregation)
    assert_same(peer, our_outcome(ours, rollout, microbatches=peer.microbatches))


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_only_update_of_a_rollout(trl, rollout, loss_type):
    rollout = rollout.on_policy()
    settings, surrogate, aggregation = LOSSES[loss_type]
    peer = trl.outcome(rollout, loss_type=loss_type, **settings)
    ours = objective(ratio=ratio_of(loss_type, "token"), surrogate=surrogate, aggregation=aggregation)
    assert_same(peer, our_outcome(ours, rollout))


@pytest.mark.parametrize("kl", KL)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_type_with_every_kl(trl, rollout, loss_type, kl):
    (settings, surrogate, aggregation), (kl_settings, penalty) = LOSSES[loss_type], KL[kl]
    peer = trl.outcome(rollout, loss_type=loss_type, **settings, **kl_settings)
    ours = objective(
        ratio=ratio_of(loss_type, "token"),
        surrogate=surrogate,
        aggregation=aggregation,
        kl=penalty,
    )
    assert_same(peer, our_outcome(ours, rollout))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(trl, rollout, option):
    settings, parts = OPTIONS[option]
    ours = our_outcome(objective(**parts), rollout)
    assert_same(trl.outcome(rollout, loss_type="dapo", **CLIPS, **settings), ours)
    assert_distinct(ours, our_outcome(objective(), rollout))


@pytest.mark.parametrize("option", ["two-sided", "off-policy mask", "truncated sequences", "masked sequences"])
def test_every_option_of_completions_at_the_level_of_completions(trl, rollout, option):
    settings, parts = OPTIONS[option]
    ours = objective(ratio=GeometricRatio(), aggregation=SequenceMeanTokenMean(), **parts)
    peer = trl.outcome(rollout, loss_type="grpo", importance_sampling_level="sequence", **CLIPS, **settings)
    assert_same(peer, our_outcome(ours, rollout))


def test_all_options_together(trl, rollout):
    chosen = [OPTIONS[name] for name in ("two-sided", "off-policy mask", "masked tokens", "truncated completions")]
    settings, parts = dict(CLIPS), {}
    for more_settings, more_parts in [*chosen, (KL["weighted_k3"][0], {"kl": KL["weighted_k3"][1]})]:
        settings |= more_settings
        parts |= more_parts | {"masks": parts.get("masks", ()) + more_parts.get("masks", ())}
    peer = trl.outcome(rollout, loss_type="dapo", num_microbatches=2, **settings)
    assert_same(peer, our_outcome(objective(**parts), rollout, microbatches=peer.microbatches))


def test_vespo_takes_the_whole_sampler_ratio(trl, rollout):
    """W = pi_theta/pi_old * pi_old/mu = pi_theta/mu, which is ours where mu takes pi_old's place."""
    settings = correction("token_truncate", 1e6)
    ours = objective(surrogate=VESPO, ratio=ProductRatio(), correction=Bypass())
    assert_same(trl.outcome(rollout, loss_type="vespo", **settings), our_outcome(ours, rollout))
    assert_distinct(our_outcome(ours, rollout), our_outcome(objective(surrogate=VESPO, ratio=ProductRatio()), rollout))


REWARDS = {
    "mixed": [[1.0], [0.0], [0.25], [1.0], [0.0], [0.0], [0.75], [0.0]],
    "a group of equals": [[1.0], [1.0], [1.0], [1.0], [0.0], [0.5], [0.75], [0.0]],
    "not applicable": [[1.0], [NAN], [0.25], [1.0], [0.0], [NAN], [NAN], [0.5]],
    "two rewards": [[1, 0.5], [0, 0.5], [0, 0], [1, 1], [0, 0.25], [1, 0], [0, 0], [0, 0.5]],
    "two rewards, not all applicable": [[1, NAN], [0, 0.5], [NAN, NAN], [1, 1], [0, NAN], [1, 0], [0, 0], [0, NAN]],
}
SCALES = {
    "group": ({"scale_rewards": "group"}, {"scale": GroupStd(ddof=1, epsilon=1e-4)}),
    "batch": ({"scale_rewards": "batch"}, {"scale": BatchStd(ddof=1, epsilon=1e-4)}),
    "none": ({"scale_rewards": "none"}, {"scale": None}),
    "each reward": (
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"advantage": PerReward(ddof=1, epsilon=1e-4), "scale": Whitened(ddof=1, epsilon=1e-4)},
    ),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("rewards", REWARDS)
def test_every_scale_of_the_advantages(trl, rewards, scale):
    settings, parts = SCALES[scale]
    rewards_BK = torch.tensor(REWARDS[rewards])
    rollout = recorded_rollout(rewards_BK=rewards_BK, weights_K=(1.0, 0.5)[: rewards_BK.shape[1]])
    ours_B = our_advantages(objective(**parts), rollout)[:, 0]
    torch.testing.assert_close(trl.advantages(rollout, **settings), ours_B, rtol=0, atol=TOLERANCE)

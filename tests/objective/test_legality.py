"""Parts that do not go together are refused when the objective is built, with both keys named."""

import math

import pytest

from grpo_lightning.objective import (
    K1,
    K3,
    BatchStd,
    Bypass,
    Cispo,
    Clipped,
    GeometricRatio,
    GeometricTokenRatio,
    Gmpo,
    GroupMean,
    GroupMeanReward,
    GroupStd,
    KLInLoss,
    KLInReturn,
    KLInReward,
    LeaveOneOut,
    MaskedWeights,
    NoBaseline,
    NoRatio,
    Objective,
    PassAtK,
    PerReward,
    ProcessSupervision,
    ProductRatio,
    Reinforce,
    Sapo,
    SignalShare,
    TokenMean,
    TokenRatio,
    TokenWhitened,
    TopEntropyTokens,
    TruncatedCompletions,
    TruncatedWeights,
    TwoSidedClipped,
    Vespo,
    Whitened,
)
from grpo_lightning.types import ConfigurationError

CLIPPED = Clipped(clip_low=0.2, clip_high=0.2)
VESPO = Vespo(power_positive=2, rate_positive=3, power_negative=3, rate_negative=2)
STD = {"ddof": 0, "epsilon": 1e-6}
ICE_POP = MaskedWeights(weight=TokenRatio(), gate=TokenRatio(), lower=0.5, upper=5.0)


def build(**parts):
    return Objective(
        **{
            "advantage": GroupMean(),
            "scale": None,
            "ratio": TokenRatio(),
            "surrogate": CLIPPED,
            "aggregation": TokenMean(),
            **parts,
        }
    )


ILLEGAL = {
    "steps have no totals to divide by": (
        ("scale", "advantage"),
        {"advantage": ProcessSupervision(**STD), "scale": GroupStd(**STD)},
    ),
    "each reward has been divided": (("scale", "advantage"), {"advantage": PerReward(**STD), "scale": BatchStd(**STD)}),
    "pass at k has been divided": (
        ("scale", "advantage"),
        {"advantage": PassAtK(k=2, threshold=1.0, epsilon=0.0), "scale": SignalShare()},
    ),
    "the mean reward belongs to the mean": (
        ("scale", "advantage"),
        {"advantage": LeaveOneOut(), "scale": GroupMeanReward()},
    ),
    "a penalty makes the mean reward negative": (
        ("kl", "scale"),
        {"scale": GroupMeanReward(), "kl": KLInReward(coefficient=0.1, estimator=K1())},
    ),
    "a penalty off totals that nobody compares": (
        ("kl", "advantage"),
        {"advantage": PerReward(**STD), "kl": KLInReward(coefficient=0.1, estimator=K1())},
    ),
    "clipping without a ratio": (("surrogate", "ratio"), {"ratio": NoRatio()}),
    "a cap without a ratio": (("surrogate", "ratio"), {"surrogate": Cispo(ratio_cap=5.0), "ratio": NoRatio()}),
    "a ratio that REINFORCE would not look at": (("surrogate", "ratio"), {"surrogate": Reinforce()}),
    "GMPO makes the completion's ratio itself": (
        ("surrogate", "ratio"),
        {"surrogate": Gmpo(log_clip=0.4), "ratio": GeometricRatio()},
    ),
    "VESPO's kernel is of the whole completion": (("surrogate", "ratio"), {"surrogate": VESPO}),
    "the completion's ratio has no token's gradient to weigh": (
        ("advantage", "ratio"),
        {"advantage": ProcessSupervision(**STD), "ratio": GeometricRatio()},
    ),
    "returns differ by token": (
        ("kl", "ratio"),
        {"ratio": ProductRatio(), "kl": KLInReturn(coefficient=0.1, estimator=K1())},
    ),
    "GMPO takes the sign of one advantage": (
        ("advantage", "surrogate"),
        {"advantage": ProcessSupervision(**STD), "surrogate": Gmpo(log_clip=0.4)},
    ),
    "a bypassed correction without a ratio": (
        ("correction", "ratio"),
        {"surrogate": Reinforce(), "ratio": NoRatio(), "correction": Bypass()},
    ),
    "the completion's ratio gives every token a gradient": (
        ("masks", "ratio"),
        {"ratio": GeometricRatio(), "masks": (TopEntropyTokens(share=0.2),)},
    ),
    "GMPO takes the tokens together, of which a mask would keep some": (
        ("masks", "surrogate"),
        {"surrogate": Gmpo(log_clip=0.4), "masks": (TopEntropyTokens(share=0.2),)},
    ),
    "a token cannot be dropped from the completion's ratio": (
        ("correction", "ratio"),
        {"ratio": GeometricRatio(), "correction": ICE_POP},
    ),
    "a token cannot be dropped from GMPO's mean": (
        ("correction", "surrogate"),
        {"surrogate": Gmpo(log_clip=0.4), "correction": ICE_POP},
    ),
    "a masked completion has no log-probabilities to penalise": (
        ("masks", "kl"),
        {"masks": (TruncatedCompletions(),), "kl": KLInReward(coefficient=0.1, estimator=K1())},
    ),
    "nor have its tokens": (
        ("masks", "kl"),
        {"masks": (TruncatedCompletions(),), "kl": KLInReturn(coefficient=0.1, estimator=K1())},
    ),
    "steps are to blame, whatever the penalty": (
        ("advantage", "ratio"),
        {
            "advantage": ProcessSupervision(**STD),
            "ratio": GeometricRatio(),
            "kl": KLInLoss(coefficient=0.1, estimator=K3()),
        },
    ),
}


@pytest.mark.parametrize(("keys", "parts"), ILLEGAL.values(), ids=ILLEGAL)
def test_refused_with_both_keys(keys, parts):
    with pytest.raises(ConfigurationError) as error:
        build(**parts)
    message = str(error.value)
    assert all(f"model.objective.{key}" in message for key in keys)
    assert len(message.splitlines()) <= 3


def test_a_mask_that_is_named_twice_is_refused():
    with pytest.raises(ConfigurationError, match=r"model\.objective\.masks"):
        build(masks=(TruncatedCompletions(), TruncatedCompletions()))


LEGAL = {
    "returns under a whitening": {
        "advantage": NoBaseline(),
        "scale": TokenWhitened(**STD),
        "kl": KLInReturn(coefficient=0.1, estimator=K1()),
    },
    "steps under a whitening": {"advantage": ProcessSupervision(**STD), "scale": Whitened(**STD)},
    "steps and GSPO-token": {"advantage": ProcessSupervision(**STD), "ratio": GeometricTokenRatio()},
    "uncertain tokens of truncated completions left out": {
        "masks": (TruncatedCompletions(), TopEntropyTokens(share=0.2))
    },
    "steps and a penalty in the loss": {
        "advantage": ProcessSupervision(**STD),
        "kl": KLInLoss(coefficient=0.1, estimator=K3()),
    },
}


@pytest.mark.parametrize("parts", LEGAL.values(), ids=LEGAL)
def test_accepted(parts):
    build(**parts)


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        (lambda: Clipped(clip_low=0.0, clip_high=0.2), "surrogate.clip_low"),
        (lambda: Clipped(clip_low=0.2, clip_high=-0.2), "surrogate.clip_high"),
        (lambda: TwoSidedClipped(clip_low=0.2, clip_high=0.2, delta=1.1), "surrogate.delta"),
        (lambda: Cispo(ratio_cap=0.0), "surrogate.ratio_cap"),
        (lambda: Sapo(temperature_positive=0.0, temperature_negative=1.0), "surrogate.temperature_positive"),
        (lambda: Gmpo(log_clip=0.0), "surrogate.log_clip"),
        (lambda: GroupStd(ddof=2, epsilon=0.0), "scale.ddof"),
        (lambda: GroupStd(ddof=1, epsilon=math.nan), "scale.epsilon"),
        (lambda: KLInLoss(coefficient=-0.1, estimator=K3()), "kl.coefficient"),
        (lambda: TruncatedWeights(weight=NoRatio(), upper=2.0), "correction.weight"),
        (lambda: TruncatedWeights(weight=TokenRatio(), upper=0.0), "correction.upper"),
        (lambda: MaskedWeights(weight=TokenRatio(), gate=TokenRatio(), lower=2.0, upper=1.0), "correction.upper"),
        (lambda: TopEntropyTokens(share=0.0), "masks.share"),
    ],
)
def test_a_setting_out_of_range_is_named(setting, key):
    with pytest.raises(ConfigurationError, match=rf"model\.objective\.{key} must be"):
        setting()

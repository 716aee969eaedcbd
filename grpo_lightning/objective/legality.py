"""Which parts of an objective go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_lightning.objective.advantage import GroupMean, StepAdvantage
from grpo_lightning.objective.correction import Bypass, MaskedWeights
from grpo_lightning.objective.mask import CompletionMask, EntropyMask
from grpo_lightning.objective.ratio import NoRatio
from grpo_lightning.objective.regularizer import KLInReturn, KLInReward, RewardPenalty
from grpo_lightning.objective.scale import GroupMeanReward
from grpo_lightning.objective.settings import name
from grpo_lightning.types import ConfigurationError

if TYPE_CHECKING:
    from grpo_lightning.objective.objective import Objective


def check_parts(objective: Objective) -> None:
    """Refuse parts that do not go together.

    Raises:
        ConfigurationError: Names the two keys and says why.
    """
    _check_advantage(objective)
    _check_surrogate(objective)
    _check_sampler(objective)
    _check_masks(objective)


def _check_advantage(objective: Objective) -> None:
    advantage, scale, kl = objective.advantage, objective.scale, objective.kl
    if scale is not None and scale.divides_by_totals and not advantage.compares_totals:
        _refuse("scale", scale, "advantage", advantage, "is computed from the total rewards, which it does not compare")
    if isinstance(kl, RewardPenalty) and not advantage.compares_totals:
        _refuse("kl", kl, "advantage", advantage, "is taken off the total rewards, which it does not compare")
    if isinstance(scale, GroupMeanReward) and not isinstance(advantage, GroupMean):
        _refuse("scale", scale, "advantage", advantage, "belongs to GroupMean")
    if isinstance(scale, GroupMeanReward) and isinstance(kl, KLInReward):
        _refuse("kl", kl, "scale", scale, "makes rewards negative, which it cannot divide by")


def _check_surrogate(objective: Objective) -> None:
    surrogate, ratio = objective.surrogate, objective.ratio
    if not isinstance(ratio, surrogate.ratios):
        allowed = " or ".join(kind.__name__ for kind in surrogate.ratios)
        _refuse("surrogate", surrogate, "ratio", ratio, f"is made for {allowed}")
    if not isinstance(objective.advantage, StepAdvantage) and not isinstance(objective.kl, KLInReturn):
        return
    is_stepwise = isinstance(objective.advantage, StepAdvantage)
    key, part = ("advantage", objective.advantage) if is_stepwise else ("kl", objective.kl)
    if not surrogate.takes_token_advantages:
        _refuse(
            key, part, "surrogate", surrogate, "gives each token an advantage, of which it takes one per completion"
        )
    if not ratio.is_per_token:
        _refuse(key, part, "ratio", ratio, "gives each token an advantage, and needs a ratio of tokens")


def _check_sampler(objective: Objective) -> None:
    correction, ratio, surrogate = objective.correction, objective.ratio, objective.surrogate
    if isinstance(correction, Bypass) and isinstance(ratio, NoRatio):
        _refuse("correction", correction, "ratio", ratio, "corrects the ratio, and there is none")
    if isinstance(correction, MaskedWeights) and correction.gate.is_per_token:
        if not ratio.is_per_token:
            _refuse("correction", correction, "ratio", ratio, "drops single tokens, and needs a ratio of tokens")
        if not surrogate.takes_token_advantages:
            _refuse("correction", correction, "surrogate", surrogate, "drops single tokens, which it takes together")


def _check_masks(objective: Objective) -> None:
    for mask in objective.masks:
        if isinstance(mask, EntropyMask) and not objective.ratio.is_per_token:
            _refuse("masks", mask, "ratio", objective.ratio, "keeps single tokens, and needs a ratio of tokens")
        if isinstance(mask, EntropyMask) and not objective.surrogate.takes_token_advantages:
            _refuse("masks", mask, "surrogate", objective.surrogate, "keeps single tokens, which it takes together")
        if isinstance(mask, CompletionMask) and isinstance(objective.kl, RewardPenalty):
            _refuse("masks", mask, "kl", objective.kl, "leaves completions without the log-probabilities it penalises")
    kinds = [type(mask) for mask in objective.masks]
    if len(set(kinds)) < len(kinds):
        raise ConfigurationError("model.objective.masks: a mask is named twice.")


def _refuse(key: str, part: object, other_key: str, other: object, why: str) -> None:
    raise ConfigurationError(
        f"model.objective.{key}: {name(part)} {why}; got model.objective.{other_key}: {name(other)}."
    )

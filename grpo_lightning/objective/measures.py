"""What an update looks like, token by token, and as sums over the loss tokens.

=============================  ======================================================================================
metric                         mean over the loss tokens of
=============================  ======================================================================================
policy/entropy                 the entropy, in nats
policy/ratio                   rho, of the token or of its completion; near 1. Its square is logged as a deviation
policy/kl_old                  rho - 1 - log rho of the token: KL(pi_old || pi_theta)
policy/clip_low, clip_high     1 where the clip took the gradient (`Surrogate.statistics`)
policy/masked                  1 where a mask took the policy gradient
policy/kl, kl_k1               the penalty before its coefficient; log pi_theta - log pi_ref
sampler/kl                     log mu - log pi: KL(mu || pi), pi the trainer's old policy (its current one, bypassed)
sampler/logprob_difference     its size
sampler/weight                 w. With its square it gives the effective sample size
=============================  ======================================================================================

Where old and current policy are the same, nothing is said of their ratio.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_lightning.functional.ratios import finite_exp
from grpo_lightning.functional.statistics import drift, over_tokens
from grpo_lightning.objective.surrogate import Surrogate
from grpo_lightning.types import LossBatch, Statistic


@dataclass(frozen=True, kw_only=True)
class UpdateMeasures:
    """What a loss was made of."""

    entropy_BT: Tensor
    logprobs_BT: Tensor
    old_logprobs_BT: Tensor | None
    """None where old and current are the same."""
    log_ratios_BT: Tensor
    """What the objective's ratio made of them."""
    advantages_BT: Tensor
    weights_BT: Tensor | None
    """Of the sampler's correction."""
    kept_BT: Tensor | None
    """bool, the tokens that kept their policy gradient."""
    kl_BT: Tensor | None


@torch.no_grad()
def update_statistics(measures: UpdateMeasures, batch: LossBatch, surrogate: Surrogate) -> dict[str, Statistic]:
    """The statistics of some completions of a minibatch; those of its parts add up."""
    per_token = {
        "policy/entropy": measures.entropy_BT,
        **_policy(measures, surrogate),
        **_reference(measures, batch),
        **_sampler(measures, batch),
    }
    return {name: Statistic(*pair) for name, pair in over_tokens(per_token, batch.mask_BT).items()}


def _policy(measures: UpdateMeasures, surrogate: Surrogate) -> dict[str, Tensor]:
    masked = {} if measures.kept_BT is None else {"policy/masked": ~measures.kept_BT}
    if measures.old_logprobs_BT is None:
        return masked
    ratios_BT = finite_exp(measures.log_ratios_BT)
    return {
        **masked,
        "policy/ratio": ratios_BT,
        "policy/ratio_square": ratios_BT.square(),
        "policy/kl_old": drift(measures.logprobs_BT, measures.old_logprobs_BT),
        **surrogate.statistics(measures.log_ratios_BT, measures.advantages_BT),
    }


def _reference(measures: UpdateMeasures, batch: LossBatch) -> dict[str, Tensor]:
    if measures.kl_BT is None or batch.reference_logprobs_BT is None:
        return {}
    return {"policy/kl": measures.kl_BT, "policy/kl_k1": measures.logprobs_BT - batch.reference_logprobs_BT}


def _sampler(measures: UpdateMeasures, batch: LossBatch) -> dict[str, Tensor]:
    if batch.sampler_logprobs_BT is None:
        return {}
    trainer_BT = measures.logprobs_BT if batch.old_logprobs_BT is None else batch.old_logprobs_BT
    difference_BT = trainer_BT - batch.sampler_logprobs_BT
    mismatch = {"sampler/kl": -difference_BT, "sampler/logprob_difference": difference_BT.abs()}
    if measures.weights_BT is None:
        return mismatch
    return {**mismatch, "sampler/weight": measures.weights_BT, "sampler/weight_square": measures.weights_BT.square()}

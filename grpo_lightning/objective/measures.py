"""What an update looks like, token by token and completion by completion. `docs/metrics.md` defines every name.

Means are sums and counts, so that any split of a minibatch adds up; a minimum or maximum stays one. A name that ends in
`_square` is a mean of (x - 1)^2, which `metrics.update` makes a deviation of. Where old and current policy are the
same, nothing is said of their ratio.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_lightning.functional.kl import k3
from grpo_lightning.functional.ratios import finite_exp, sequence_mean, sequence_sum
from grpo_lightning.functional.statistics import drift, lowest_and_highest, over_tokens
from grpo_lightning.objective.surrogate import Surrogate
from grpo_lightning.types import LossBatch, LossOutput, Statistic

RANGES = ("policy/ratio", "sampler/logprob_difference", "policy/clip_fraction_sequence")
"""Of what the least and the greatest value are reported too."""


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
    is_out_of_bounds_BT: Tensor | None
    """bool, the weights that the correction truncated or set to 0."""
    kept_BT: Tensor | None
    """bool, the tokens that kept their policy gradient."""
    kl_BT: Tensor | None


@torch.no_grad()
def measured_loss(
    loss: Tensor, parts: Mapping[str, Tensor], measures: UpdateMeasures, batch: LossBatch, surrogate: Surrogate
) -> LossOutput:
    """The loss of some completions of a minibatch, with what is measured of them.

    Args:
        loss: With its gradient.
        parts: By metric name, the loss and the terms that it is the sum of.
        measures: What the loss was made of.
        batch: The completions.
        surrogate: Knows what it clips.
    """
    mask_BT, mask_B1 = batch.mask_BT, batch.mask_BT.any(dim=1, keepdim=True)
    per_token = {
        "policy/entropy": measures.entropy_BT,
        **_ratio(measures, surrogate),
        **_masked(measures),
        **_reference(measures, batch),
        **_mismatch(measures, batch),
        **_correction(measures),
    }
    per_completion = _of_completions(per_token, mask_BT)
    ranges = {
        **{name: lowest_and_highest(per_token[name], mask_BT) for name in RANGES if name in per_token},
        **{name: lowest_and_highest(per_completion[name], mask_B1) for name in RANGES if name in per_completion},
    }
    return LossOutput(
        loss,
        statistics={**_means(per_token, mask_BT), **_means(per_completion, mask_B1)},
        parts={name: part.detach().double() for name, part in parts.items()},
        lowest={f"{name}_min": low for name, (low, _) in ranges.items()},
        highest={f"{name}_max": high for name, (_, high) in ranges.items()},
        values={"policy/entropy": measures.entropy_BT.masked_fill(~mask_BT, float("nan")).flatten()},
    )


def _ratio(measures: UpdateMeasures, surrogate: Surrogate) -> dict[str, Tensor]:
    if measures.old_logprobs_BT is None:
        return {}
    ratios_BT = finite_exp(measures.log_ratios_BT)
    return {
        "policy/ratio": ratios_BT,
        "policy/ratio_square": (ratios_BT - 1).square(),
        "policy/kl_old": drift(measures.logprobs_BT, measures.old_logprobs_BT),
        **surrogate.statistics(measures.log_ratios_BT, measures.advantages_BT),
    }


def _masked(measures: UpdateMeasures) -> dict[str, Tensor]:
    return {} if measures.kept_BT is None else {"policy/masked": ~measures.kept_BT}


def _reference(measures: UpdateMeasures, batch: LossBatch) -> dict[str, Tensor]:
    if measures.kl_BT is None or batch.reference_logprobs_BT is None:
        return {}
    return {
        "policy/kl": measures.kl_BT,
        "policy/kl_k1": measures.logprobs_BT - batch.reference_logprobs_BT,
        "policy/kl_k3": k3(measures.logprobs_BT, batch.reference_logprobs_BT),
    }


def _mismatch(measures: UpdateMeasures, batch: LossBatch) -> dict[str, Tensor]:
    if batch.sampler_logprobs_BT is None:
        return {}
    trainer_BT = measures.logprobs_BT if batch.old_logprobs_BT is None else batch.old_logprobs_BT
    log_weights_BT = trainer_BT - batch.sampler_logprobs_BT
    weights_BT = finite_exp(log_weights_BT)
    return {
        "sampler/kl": -log_weights_BT,
        "sampler/kl_k3": drift(trainer_BT, batch.sampler_logprobs_BT),
        "sampler/logprob_difference": log_weights_BT.abs(),
        "sampler/multiplicative_error": finite_exp(log_weights_BT.abs()),
        "sampler/weight": weights_BT,
        "sampler/weight_square": (weights_BT - 1).square(),
    }


def _correction(measures: UpdateMeasures) -> dict[str, Tensor]:
    if measures.weights_BT is None or measures.is_out_of_bounds_BT is None:
        return {}
    return {
        "sampler/correction": measures.weights_BT,
        "sampler/correction_square": (measures.weights_BT - 1).square(),
        "sampler/out_of_bounds": measures.is_out_of_bounds_BT,
    }


def _of_completions(per_token: Mapping[str, Tensor], mask_BT: Tensor) -> dict[str, Tensor]:
    """What is said of completions as a whole, of shape [B, 1]."""
    found = {}
    if "policy/kl_k1" in per_token:
        found["policy/kl_sequence"] = sequence_sum(per_token["policy/kl_k1"], mask_BT)
    if "policy/masked" in per_token:
        found["policy/masked_completions"] = _share(per_token["policy/masked"], mask_BT) == 1
    if "policy/clip_fraction" in per_token:
        found["policy/clip_fraction_sequence"] = _share(per_token["policy/clip_fraction"], mask_BT)
    return found


def _share(is_so_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return sequence_mean(is_so_BT.double().expand_as(mask_BT), mask_BT)


def _means(values: Mapping[str, Tensor], mask: Tensor) -> dict[str, Statistic]:
    return {name: Statistic(*pair) for name, pair in over_tokens(values, mask).items()}

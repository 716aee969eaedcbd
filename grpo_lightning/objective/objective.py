"""The objective: advantage, ratio, surrogate, correction, masks, regularisers and aggregation, put together."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from grpo_lightning.objective.advantage import Advantage, GroupMean, StepAdvantage
from grpo_lightning.objective.aggregation import Aggregation, SequenceMeanTokenMean
from grpo_lightning.objective.correction import Bypass, Correction, WeightedCorrection
from grpo_lightning.objective.credit import Credit, Gather, on_one_rank
from grpo_lightning.objective.legality import check_parts
from grpo_lightning.objective.mask import CompletionMask, EntropyMask, Mask, UpdateMask
from grpo_lightning.objective.measures import UpdateMeasures, measured_loss
from grpo_lightning.objective.ratio import Ratio, TokenRatio
from grpo_lightning.objective.regularizer import (
    K3,
    EntropyBonus,
    KLInLoss,
    KLPenalty,
    LossPenalty,
    RewardPenalty,
)
from grpo_lightning.objective.scale import GroupStd, Scale
from grpo_lightning.objective.surrogate import Clipped, Surrogate
from grpo_lightning.types import (
    Coefficients,
    CompletionTokens,
    LossBatch,
    LossOutput,
    MinibatchCounts,
    ScoredGroups,
    TokenScores,
)


@dataclass(frozen=True, kw_only=True)
class Objective:
    r"""What is maximised: a point of a grid, whose axes are the arguments.

    .. math::
        J(\theta) = \operatorname{AGG}_{i,t}\left[
            w_{i,t}\, M_{i,t}\, f(\rho_{i,t}, \hat A_{i,t}) - \beta\, D_{KL}^{(i,t)} + \alpha\, H_{i,t} \right],
        \qquad \hat A = \frac{(r - b) - s}{d}

    With `grpo`'s parts it is equation 3 of DeepSeekMath (https://arxiv.org/abs/2402.03300); `configs/algorithm/` has
    the named algorithms.

    Args:
        advantage: b: what rewards are compared with.
        scale: s and d; None divides by nothing.
        ratio: rho: of tokens or of completions.
        surrogate: f.
        aggregation: AGG.
        correction: w, for a sampler that is not quite the trainer's policy; None for none.
        masks: M, and which completions are left out altogether.
        kl: beta, the estimator, and whether it is in the loss or in the reward; None for no reference model.
        entropy: alpha; None for no bonus.

    Raises:
        ConfigurationError: Two parts do not go together; the message names both keys.
    """

    advantage: Advantage
    scale: Scale | None
    ratio: Ratio
    surrogate: Surrogate
    aggregation: Aggregation
    correction: Correction | None = None
    masks: tuple[Mask, ...] = ()
    kl: KLPenalty | None = None
    entropy: EntropyBonus | None = None

    def __post_init__(self) -> None:
        check_parts(self)

    # What must be computed before the first update

    @property
    def coefficients(self) -> Coefficients:
        """Those that a run begins with."""
        return Coefficients(
            kl=self.kl.coefficient if self.kl is not None else 0.0,
            entropy=self.entropy.coefficient if self.entropy is not None else 0.0,
        )

    def describe(self, coefficients: Coefficients) -> dict[str, float]:
        """The coefficients of the regularisers that there are, by metric name."""
        kl = {"policy/kl_coefficient": coefficients.kl} if self.kl is not None else {}
        return {**kl, "policy/entropy_coefficient": coefficients.entropy} if self.entropy is not None else kl

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's log-probabilities are asked for."""
        return self.kl is not None and self.kl.coefficient > 0

    def needs_old_logprobs(self, *, num_updates: int) -> bool:
        """Whether the policy's log-probabilities before the first update are asked for.

        Args:
            num_updates: Optimizer steps of an iteration. With one, old and current are the same.
        """
        in_the_loss = num_updates > 1 and not isinstance(self.correction, Bypass)
        return in_the_loss or self._penalty_in_reward is not None or self.entropy_mask is not None

    @property
    def needs_tokens(self) -> bool:
        """Whether `advantages` asks for the tokens: for step scores, or for a penalty in the reward."""
        return isinstance(self.advantage, StepAdvantage) or self._penalty_in_reward is not None

    @property
    def needs_entropy_gradient(self) -> bool:
        """Whether the loss is differentiated through the entropy."""
        return self.entropy is not None

    @property
    def entropy_mask(self) -> EntropyMask | None:
        """The mask that is drawn from the old policy's entropies over the global minibatch."""
        return next((mask for mask in self.masks if isinstance(mask, EntropyMask)), None)

    def keeps(self, is_truncated_B: Tensor) -> Tensor:
        """bool, the completions that the masks leave in the update."""
        keep_B = torch.ones_like(is_truncated_B)
        for mask in self.masks:
            if isinstance(mask, CompletionMask):
                keep_B = keep_B & mask(is_truncated_B)
        return keep_B

    @property
    def _penalty_in_reward(self) -> RewardPenalty | None:
        return self.kl if self.needs_reference and isinstance(self.kl, RewardPenalty) else None

    # Advantages

    def advantages(
        self,
        groups: ScoredGroups,
        coefficients: Coefficients,
        *,
        tokens: CompletionTokens | None = None,
        gather: Gather = on_one_rank,
    ) -> Tensor:
        """The advantages of this rank's completions, as if all ranks were one.

        Args:
            groups: Of this rank.
            coefficients: Of the moment.
            tokens: Of this rank's B completions, prompt-major, where `needs_tokens`.
            gather: A collective over the ranks.

        Returns:
            float64, shape [B, 1] where the tokens of a completion have one advantage, else [B, T].
        """
        penalty = self._penalty_in_reward
        credit = Credit(
            advantage=self.advantage, scale=self.scale, penalty=penalty, coefficient=coefficients.kl if penalty else 0.0
        )
        return credit.assign(groups, tokens, gather)

    # The loss of an update

    def loss(
        self, scores: TokenScores, batch: LossBatch, counts: MinibatchCounts, coefficients: Coefficients
    ) -> LossOutput:
        """The loss of some completions of a minibatch, as a share of the whole minibatch's.

        Args:
            scores: The policy's log-probabilities now.
            batch: What does not change during the updates.
            counts: Of the whole global minibatch.
            coefficients: Of the moment.
        """
        batch = _in_precision(batch, scores.logprobs_BT.dtype)
        logprobs_BT, advantages_BT, mask_BT = scores.logprobs_BT, batch.advantages_BT, batch.mask_BT
        old_logprobs_BT = self._old_logprobs(logprobs_BT, batch)
        log_ratios_BT = self.ratio(logprobs_BT - old_logprobs_BT, mask_BT)
        objective_BT = self.surrogate(log_ratios_BT, logprobs_BT, advantages_BT, mask_BT)
        weights_BT, is_out_of_bounds_BT = self._correction_weights(old_logprobs_BT, batch)
        if weights_BT is not None:
            objective_BT = objective_BT * weights_BT
        kept_BT = self._kept(logprobs_BT, advantages_BT, batch)
        if kept_BT is not None:
            objective_BT = objective_BT * kept_BT
        terms = {"train/policy_loss": objective_BT}
        kl_BT = self._kl(logprobs_BT, old_logprobs_BT, batch)
        if kl_BT is not None and isinstance(self.kl, LossPenalty):
            terms["train/kl_loss"] = -coefficients.kl * kl_BT
        if self.entropy is not None:
            terms["train/entropy_loss"] = coefficients.entropy * scores.entropy_BT
        loss, parts = self._aggregated(terms, batch, counts)
        measures = UpdateMeasures(
            entropy_BT=scores.entropy_BT,
            logprobs_BT=logprobs_BT,
            old_logprobs_BT=old_logprobs_BT if self._can_differ(batch) else None,
            log_ratios_BT=log_ratios_BT,
            advantages_BT=advantages_BT,
            weights_BT=weights_BT,
            is_out_of_bounds_BT=is_out_of_bounds_BT,
            kept_BT=kept_BT,
            kl_BT=kl_BT,
        )
        return measured_loss(loss, parts, measures, batch, self.surrogate)

    def _aggregated(
        self, terms: Mapping[str, Tensor], batch: LossBatch, counts: MinibatchCounts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and what of it each term of the objective makes out."""
        loss = -self.aggregation(reduce(torch.add, terms.values()), batch, counts)
        with torch.no_grad():
            parts = {name: -self.aggregation(term, batch, counts) for name, term in terms.items()}
        return loss, {"train/loss": loss, **parts}

    def _can_differ(self, batch: LossBatch) -> bool:
        """Whether old and current policy may be two."""
        return batch.old_logprobs_BT is not None or isinstance(self.correction, Bypass)

    def _old_logprobs(self, logprobs_BT: Tensor, batch: LossBatch) -> Tensor:
        if isinstance(self.correction, Bypass):
            assert batch.sampler_logprobs_BT is not None, "the correction needs the sampler's log-probabilities"
            return batch.sampler_logprobs_BT
        return logprobs_BT.detach() if batch.old_logprobs_BT is None else batch.old_logprobs_BT

    def _correction_weights(
        self, old_logprobs_BT: Tensor, batch: LossBatch
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The weights of the tokens, and where a bound has changed them."""
        if not isinstance(self.correction, WeightedCorrection):
            return None, None
        assert batch.sampler_logprobs_BT is not None, "the correction needs the sampler's log-probabilities"
        log_weights_BT = old_logprobs_BT - batch.sampler_logprobs_BT
        correction, mask_BT = self.correction, batch.mask_BT
        return correction(log_weights_BT, mask_BT), correction.is_out_of_bounds(log_weights_BT, mask_BT)

    def _kept(self, logprobs_BT: Tensor, advantages_BT: Tensor, batch: LossBatch) -> Tensor | None:
        """bool, the tokens that keep their policy gradient; None for all."""
        kept_BT = batch.policy_mask_BT
        for mask in self.masks:
            if isinstance(mask, UpdateMask):
                assert batch.sampler_logprobs_BT is not None, "the mask needs the sampler's log-probabilities"
                more_BT = mask(logprobs_BT, batch.sampler_logprobs_BT, advantages_BT, batch.mask_BT)
                kept_BT = more_BT if kept_BT is None else kept_BT & more_BT
        return kept_BT

    def _kl(self, logprobs_BT: Tensor, old_logprobs_BT: Tensor, batch: LossBatch) -> Tensor | None:
        """The divergence from the reference at each token; a constant where it is not in the loss."""
        if self.kl is None or batch.reference_logprobs_BT is None:
            return None
        if isinstance(self.kl, LossPenalty):
            return self.kl(logprobs_BT, old_logprobs_BT, batch.reference_logprobs_BT)
        return self.kl.estimator(logprobs_BT.detach(), batch.reference_logprobs_BT)


def _in_precision(batch: LossBatch, dtype: torch.dtype) -> LossBatch:
    """What was recorded in float64 in the precision of the policy's log-probabilities."""
    sampler_logprobs_BT = batch.sampler_logprobs_BT
    return batch._replace(
        advantages_BT=batch.advantages_BT.to(dtype),
        sampler_logprobs_BT=None if sampler_logprobs_BT is None else sampler_logprobs_BT.to(dtype),
    )


def grpo(*, clip: float = 0.2, kl_coefficient: float = 0.04) -> Objective:
    """The objective of DeepSeekMath, equation 3: clipped ratio, group-normalised advantages, k3 in the loss."""
    return Objective(
        advantage=GroupMean(),
        scale=GroupStd(ddof=1, epsilon=1e-6),
        ratio=TokenRatio(),
        surrogate=Clipped(clip_low=clip, clip_high=clip),
        kl=KLInLoss(coefficient=kl_coefficient, estimator=K3()),
        aggregation=SequenceMeanTokenMean(),
    )

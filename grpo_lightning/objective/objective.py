"""The objective: advantage, surrogate, KL penalty and aggregation, put together."""

from dataclasses import dataclass

from torch import Tensor

from grpo_lightning.functional.kl import k3
from grpo_lightning.objective.advantage import Advantage, GroupNormalized
from grpo_lightning.objective.aggregation import Aggregation, SequenceMeanTokenMean
from grpo_lightning.objective.kl_penalty import KLPenalty
from grpo_lightning.objective.surrogate import Clipped, Surrogate
from grpo_lightning.types import LossBatch, LossOutput, MinibatchCounts, Statistic, TokenScores


@dataclass(frozen=True, kw_only=True)
class Objective:
    r"""What GRPO maximises.

    .. math::
        J(\theta) = \operatorname{AGG}_{i,t}\left[ f(\rho_{i,t}, \hat A_i) - \beta\, D_{KL}^{(i,t)} \right]

    With `grpo`'s parts it is equation 3 of DeepSeekMath (https://arxiv.org/abs/2402.03300).

    Args:
        advantage: How rewards become advantages, A.
        surrogate: f.
        kl: beta and the estimator; None for no reference model.
        aggregation: AGG.
    """

    advantage: Advantage
    surrogate: Surrogate
    aggregation: Aggregation
    kl: KLPenalty | None = None

    @property
    def needs_reference(self) -> bool:
        """Whether the loss asks for the reference's log-probabilities."""
        return self.kl is not None and self.kl.coefficient > 0

    def loss(self, scores: TokenScores, batch: LossBatch, counts: MinibatchCounts) -> LossOutput:
        """The loss of some completions of a minibatch, as a share of the whole minibatch's.

        Args:
            scores: The policy's log-probabilities now.
            batch: What does not change during the updates.
            counts: Of the whole global minibatch.
        """
        logprobs_BT, mask_BT = scores.logprobs_BT, batch.mask_BT
        old_logprobs_BT = logprobs_BT.detach() if batch.old_logprobs_BT is None else batch.old_logprobs_BT
        advantages_BT = batch.advantages_BT.to(logprobs_BT.dtype)
        objective_BT, per_token = self.surrogate(logprobs_BT, old_logprobs_BT, advantages_BT)
        if self.kl is not None and batch.reference_logprobs_BT is not None:
            kl_BT = k3(logprobs_BT, batch.reference_logprobs_BT)
            objective_BT = objective_BT - self.kl.coefficient * kl_BT
            per_token["policy/kl"] = kl_BT
        per_token["policy/entropy"] = scores.entropy_BT
        loss = -self.aggregation(objective_BT, mask_BT, counts)
        return LossOutput(loss, {name: _over_tokens(values_BT, mask_BT) for name, values_BT in per_token.items()})


def _over_tokens(values_BT: Tensor, mask_BT: Tensor) -> Statistic:
    values_BT = values_BT.detach().double()
    return Statistic(values_BT.masked_fill(~mask_BT, 0.0).sum(), mask_BT.sum().double())


def grpo(*, clip: float = 0.2, kl_coefficient: float = 0.04) -> Objective:
    """The objective of DeepSeekMath, equation 3: clipped ratio, group-normalised advantages, k3 in the loss."""
    return Objective(
        advantage=GroupNormalized(ddof=1, epsilon=1e-6),
        surrogate=Clipped(clip_low=clip, clip_high=clip),
        kl=KLPenalty(coefficient=kl_coefficient),
        aggregation=SequenceMeanTokenMean(),
    )

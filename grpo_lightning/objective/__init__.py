"""The objective: one algebra of small parts, each over pure functions."""

from grpo_lightning.objective.advantage import Advantage, GroupNormalized
from grpo_lightning.objective.aggregation import Aggregation, SequenceMeanTokenMean, TokenMean
from grpo_lightning.objective.kl_penalty import KLPenalty
from grpo_lightning.objective.objective import Objective, grpo
from grpo_lightning.objective.surrogate import Clipped, Surrogate

__all__ = [
    "Advantage",
    "Aggregation",
    "Clipped",
    "GroupNormalized",
    "KLPenalty",
    "Objective",
    "SequenceMeanTokenMean",
    "Surrogate",
    "TokenMean",
    "grpo",
]

"""Groups: which of them the update learns from, and what replaces the others."""

from grpo_lightning.groups.dynamic_sampling import DynamicSampling
from grpo_lightning.groups.filter import DropZeroVariance, GroupFilter, KeepAll
from grpo_lightning.groups.outcome import GroupOutcome
from grpo_lightning.groups.refill import Refill
from grpo_lightning.groups.selection import ScoredRollout, Selection

__all__ = [
    "DropZeroVariance",
    "DynamicSampling",
    "GroupFilter",
    "GroupOutcome",
    "KeepAll",
    "Refill",
    "ScoredRollout",
    "Selection",
]

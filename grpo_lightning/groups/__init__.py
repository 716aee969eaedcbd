"""Group filters: which groups the update learns from."""

from grpo_lightning.groups.filter import DropZeroVariance, GroupFilter, KeepAll

__all__ = ["DropZeroVariance", "GroupFilter", "KeepAll"]

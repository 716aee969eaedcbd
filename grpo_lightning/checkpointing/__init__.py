"""Checkpoints that are whole or recognised as torn, and the policy beside each."""

from grpo_lightning.checkpointing.choice import make_room, whole_checkpoint
from grpo_lightning.checkpointing.destination import check_destination
from grpo_lightning.checkpointing.export import PolicyExport, VerifiedCheckpoints
from grpo_lightning.checkpointing.manifest import problem_of
from grpo_lightning.checkpointing.reading import read_mapped
from grpo_lightning.checkpointing.search import found_checkpoints
from grpo_lightning.checkpointing.writing import policy_folder, write_whole

__all__ = [
    "PolicyExport",
    "VerifiedCheckpoints",
    "check_destination",
    "found_checkpoints",
    "make_room",
    "policy_folder",
    "problem_of",
    "read_mapped",
    "whole_checkpoint",
    "write_whole",
]

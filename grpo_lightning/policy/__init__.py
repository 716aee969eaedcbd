"""Policies: what is trained, where it comes from, and the reference it is held to."""

from grpo_lightning.policy.character import CharacterPolicy
from grpo_lightning.policy.mixing import mix
from grpo_lightning.policy.policy import Policy, frozen_copy
from grpo_lightning.policy.pretrained import PretrainedPolicy
from grpo_lightning.policy.source import PolicySource
from grpo_lightning.policy.weights import NamedWeights

__all__ = ["CharacterPolicy", "NamedWeights", "Policy", "PolicySource", "PretrainedPolicy", "frozen_copy", "mix"]

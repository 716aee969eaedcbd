"""Policies: what is trained, where it comes from, and the reference it is held to."""

from grpo_lightning.policy.adaptation import is_adapted
from grpo_lightning.policy.adapter_folder import adapter_weights, is_adapter
from grpo_lightning.policy.character import CharacterPolicy
from grpo_lightning.policy.compilation import Compile
from grpo_lightning.policy.loading import PolicyRecipe, load_on_first_rank
from grpo_lightning.policy.lora import LoRA
from grpo_lightning.policy.mixing import mix
from grpo_lightning.policy.policy import Policy
from grpo_lightning.policy.pretrained import PretrainedPolicy
from grpo_lightning.policy.reference import Unadapted, frozen_copy
from grpo_lightning.policy.source import PolicySource
from grpo_lightning.policy.weights import NamedWeights

__all__ = [
    "CharacterPolicy",
    "Compile",
    "LoRA",
    "NamedWeights",
    "Policy",
    "PolicyRecipe",
    "PolicySource",
    "PretrainedPolicy",
    "Unadapted",
    "adapter_weights",
    "frozen_copy",
    "is_adapted",
    "is_adapter",
    "load_on_first_rank",
    "mix",
]

"""Data: prompts, their order, and the splits."""

from grpo_lightning.data.arithmetic import Arithmetic
from grpo_lightning.data.module import EvaluationLoader, PromptDataModule
from grpo_lightning.data.stream import PromptStream

__all__ = ["Arithmetic", "EvaluationLoader", "PromptDataModule", "PromptStream"]

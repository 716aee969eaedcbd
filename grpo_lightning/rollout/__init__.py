"""Rollout engines: draw completions from the policy."""

from grpo_lightning.rollout.drawing import draw_each, draw_groups
from grpo_lightning.rollout.engine import RolloutEngine
from grpo_lightning.rollout.inprocess import InProcessEngine
from grpo_lightning.rollout.vllm import VLLMEngine
from grpo_lightning.rollout.vllm_server import VLLMServerEngine

__all__ = ["InProcessEngine", "RolloutEngine", "VLLMEngine", "VLLMServerEngine", "draw_each", "draw_groups"]

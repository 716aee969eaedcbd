"""Rollout engines: draw completions from the policy."""

from grpo_lightning.rollout.agreement import together
from grpo_lightning.rollout.ahead import RolloutAhead
from grpo_lightning.rollout.drawing import begin_groups, draw_each, draw_groups
from grpo_lightning.rollout.engine import DrawsAhead, RolloutEngine, RolloutLostError
from grpo_lightning.rollout.inprocess import InProcessEngine
from grpo_lightning.rollout.vllm import VLLMEngine
from grpo_lightning.rollout.vllm_server import VLLMServerEngine

__all__ = [
    "DrawsAhead",
    "InProcessEngine",
    "RolloutAhead",
    "RolloutEngine",
    "RolloutLostError",
    "VLLMEngine",
    "VLLMServerEngine",
    "begin_groups",
    "draw_each",
    "draw_groups",
    "together",
]

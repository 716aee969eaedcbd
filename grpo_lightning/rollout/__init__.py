"""Rollout engines: draw completions from the policy."""

from grpo_lightning.rollout.drawing import draw_each, draw_groups
from grpo_lightning.rollout.engine import RolloutEngine
from grpo_lightning.rollout.inprocess import InProcessEngine

__all__ = ["InProcessEngine", "RolloutEngine", "draw_each", "draw_groups"]

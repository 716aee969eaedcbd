"""Rollout engines: draw completions from the policy."""

from grpo_lightning.rollout.engine import RolloutEngine

__all__ = ["RolloutEngine"]

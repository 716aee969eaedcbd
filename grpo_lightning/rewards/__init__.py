"""Rewards: what a completion is worth."""

from grpo_lightning.rewards.callback import RewardCallback

__all__ = ["RewardCallback"]

"""Rewards: what a completion is worth."""

from grpo_lightning.rewards.callback import RewardCallback
from grpo_lightning.rewards.function_reward import FunctionReward
from grpo_lightning.rewards.scoring import (
    RewardFailureError,
    check_failure_rate,
    check_max_failure_rate,
    find_rewards,
    score_rollout,
)

__all__ = [
    "FunctionReward",
    "RewardCallback",
    "RewardFailureError",
    "check_failure_rate",
    "check_max_failure_rate",
    "find_rewards",
    "score_rollout",
]

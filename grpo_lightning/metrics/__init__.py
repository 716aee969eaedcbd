"""What is logged of a rollout and of an update: each metric is a sum and a count until the ranks have been added up."""

from grpo_lightning.metrics.rollout import rollout_metrics
from grpo_lightning.metrics.update import UpdateStatistics

__all__ = ["UpdateStatistics", "rollout_metrics"]

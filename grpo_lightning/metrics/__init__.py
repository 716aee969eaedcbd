"""What is logged of a rollout and of an update. `docs/metrics.md` defines every metric.

No split enters: what a rank knows stays rows, sums and counts, or extremes, until those of all ranks are put together.
"""

from grpo_lightning.metrics.logging import log_metrics
from grpo_lightning.metrics.rollout import learning_metrics, rollout_metrics
from grpo_lightning.metrics.update import UpdateStatistics

__all__ = ["UpdateStatistics", "learning_metrics", "log_metrics", "rollout_metrics"]

"""How a run ends early: when one of its ranks is gone, and when it is asked to stop."""

from grpo_lightning.ending.end_together import EndTogether
from grpo_lightning.ending.stopping import StoppedRun, Stopping

__all__ = ["EndTogether", "StoppedRun", "Stopping"]

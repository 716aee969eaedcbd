"""How much memory a run needs, from its config alone: no weights are loaded and nothing is computed."""

from grpo_lightning.planning.command import main

__all__ = ["main"]

"""Observer: the progress bar, with what matters in GRPO."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class TrainingProgress(RichProgressBar):
    """Rich's progress bar with iteration, reward, solve rate, tokens per second and the phase at work.

    Args:
        refresh_rate: Micro-batches between two refreshes.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.phase: str | None = None

    def on_phase(self, trainer: Trainer, pl_module: LightningModule, phase: str | None) -> None:
        """Show the phase at once: a rollout may take long."""
        self.phase = phase
        if phase is not None and self._metric_component is not None and self.progress is not None:
            self._update_metrics(trainer, pl_module)
            self.refresh()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What stands beside the bar."""
        logged = trainer.callback_metrics
        shown: dict[str, Any] = {"iteration": getattr(pl_module, "iteration", 0)}
        for name in ("reward/mean", "reward/solve_rate", "validation/accuracy"):
            if name in logged:
                shown[name.split("/")[1] if name != "reward/mean" else "reward"] = f"{float(logged[name]):.3f}"
        seconds = sum(getattr(pl_module, "seconds_by_phase", {}).values())
        if seconds:
            shown["tokens/s"] = f"{getattr(pl_module, 'tokens_generated', 0) / seconds:,.0f}"
        return {**shown, "phase": self.phase or "-"}

"""Observer: the progress of a run, as a bar in a terminal and as plain lines anywhere else."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import CustomBarColumn, ProcessingSpeedColumn
from rich.console import Console

from grpo_lightning.types import ConfigurationError

SHOWN = {
    "reward/mean": ("reward", "{:.3f}"),
    "reward/solve_rate": ("solved", "{:.0%}"),
    "train/loss": ("loss", "{:.3f}"),
    "validation/accuracy": ("held-out", "{:.1%}"),
}
"""The logged metrics that stand beside the bar: by what name, in what form."""

PHASE_WIDTH = len("evaluate")
BAR_WIDTH = 16


class TrainingProgress(RichProgressBar):
    """Lightning's rich progress bar with iteration, phase at work, reward, solve rate and tokens per second.

    A run whose output is no terminal (a file, a continuous-integration log) gets one plain line every few iterations.
    The bar spans the run, not an epoch. Metrics that the module logs with ``prog_bar=True`` are shown as well. A module
    without iterations (the cold start) is counted in optimizer steps.

    Args:
        refresh_rate: Most often the bar is drawn, per second; 0 shows nothing.
        print_every_n_iterations: How often a line is printed where the output is no terminal.
        console_kwargs: Arguments of `rich.console.Console`.

    Raises:
        ConfigurationError: An argument is out of its range.
    """

    def __init__(
        self,
        refresh_rate: int = 4,
        print_every_n_iterations: int = 10,
        console_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if refresh_rate < 0:
            raise ConfigurationError(f"TrainingProgress.refresh_rate must be >= 0, got {refresh_rate}.")
        if print_every_n_iterations < 1:
            raise ConfigurationError(
                f"TrainingProgress.print_every_n_iterations must be >= 1, got {print_every_n_iterations}."
            )
        super().__init__(refresh_rate=refresh_rate, console_kwargs=console_kwargs)
        self.print_every_n_iterations = print_every_n_iterations
        self._prints_lines = False
        self._phase = ""
        self._shown_iteration = 0
        self._total: float = float("inf")
        self._unit = "iteration"
        self._seconds: dict[str, float] = {}
        self._tokens = 0
        self._tokens_per_second: float | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Choose between the bar and the lines."""
        super().setup(trainer, pl_module, stage)
        console = Console(**self._console_kwargs)
        if not (console.is_terminal or console.is_jupyter):
            self._prints_lines = self.is_enabled
            self.disable()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin the bar where the run begins: at 0, or where a checkpoint left off."""
        super().on_train_start(trainer, pl_module)
        self._unit = "iteration" if hasattr(pl_module, "iteration") else "step"
        steps = trainer.estimated_stepping_batches
        if steps != float("inf"):
            self._total = -(-int(steps) // getattr(pl_module, "num_updates", 1))
        self._shown_iteration = _iteration(trainer, pl_module)
        self._take_stock(pl_module)
        if self.progress is not None and self.is_enabled:
            self.train_progress_bar_id = self.progress.add_task(
                self._description(), total=self._total, completed=self._shown_iteration
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """An epoch begins no new bar."""

    def on_phase(self, trainer: Trainer, pl_module: Any, phase: str | None) -> None:  # noqa: ARG002
        """Show the phase at once: a rollout may take long. Between two phases the last one stays."""
        if phase is None or phase == self._phase:
            return
        self._phase = phase
        if self.progress is not None and self.is_enabled and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, description=self._description())
            self.refresh()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Show an iteration when it is over; a micro-batch changes nothing that is shown."""
        iteration = _iteration(trainer, pl_module)
        if iteration == self._shown_iteration:
            return
        is_first = self._shown_iteration == 0
        self._shown_iteration = iteration
        if self._prints_lines:
            if is_first or iteration % self.print_every_n_iterations == 0 or iteration == self._total:
                self._print_line(trainer, pl_module)
        elif self.progress is not None and self.train_progress_bar_id is not None:
            self._take_stock(pl_module)
            self.progress.update(self.train_progress_bar_id, completed=iteration)
            self._update_metrics(trainer, pl_module)
            self.refresh()

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Say what a validation found, where no bar does."""
        super().on_validation_end(trainer, pl_module)
        if self._prints_lines and trainer.state.fn == "fit" and not trainer.sanity_checking:
            metrics, prefix = trainer.callback_metrics.items(), "validation/"
            found = [f"{n.removeprefix(prefix)} {float(v):.4g}" for n, v in metrics if n.startswith(prefix)]
            self.print("  ".join([f"{self._unit} {_iteration(trainer, pl_module)}  validation:", *found]), flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: ARG002
        """Leave the finished bar standing; what is printed from now on stands below it."""
        self._stop_progress()

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Lightning's columns, narrow enough to leave room for the metrics."""
        columns = [c for c in super().configure_columns(trainer) if not isinstance(c, ProcessingSpeedColumn)]
        for column in columns:
            if isinstance(column, CustomBarColumn):
                column.bar_width = BAR_WIDTH
        return columns

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:  # noqa: ARG002
        """What stands beside the bar, by its name there."""
        logged = trainer.callback_metrics
        shown = {label: form.format(float(logged[n])) for n, (label, form) in SHOWN.items() if n in logged}
        others = {n: f"{float(v):.3f}" for n, v in trainer.progress_bar_metrics.items() if n not in SHOWN}
        rate = self._tokens_per_second
        return {**shown, **others, **({} if rate is None else {"tokens/s": f"{rate:,.0f}"})}

    def _description(self) -> str:
        return f"{self._unit.capitalize()} {self._phase:{PHASE_WIDTH}}"

    def _take_stock(self, module: Any) -> dict[str, float]:
        """The seconds of each phase since this was last asked; the speed of generation and training together."""
        seconds, tokens = dict(getattr(module, "seconds_by_phase", {})), getattr(module, "tokens_generated", 0)
        spent = {phase: total - self._seconds.get(phase, 0.0) for phase, total in seconds.items()}
        trained = sum(value for phase, value in spent.items() if phase != "evaluate")
        self._tokens_per_second = (tokens - self._tokens) / trained if trained > 0 else None
        self._seconds, self._tokens = seconds, tokens
        return spent

    def _print_line(self, trainer: Trainer, module: Any) -> None:
        spent = self._take_stock(module)
        total = "" if self._total == float("inf") else f"/{self._total:.0f}"
        shown = [f"{name} {value}" for name, value in self.get_metrics(trainer, module).items()]
        phases = [f"{phase} {seconds:.1f} s" for phase, seconds in spent.items() if seconds >= 0.05]
        self.print("  ".join([f"{self._unit} {self._shown_iteration}{total}", *shown, *phases]), flush=True)


def _iteration(trainer: Trainer, module: Any) -> int:
    """Iterations completed, or optimizer steps where a module knows no iterations."""
    return int(getattr(module, "iteration", trainer.global_step))

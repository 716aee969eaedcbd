"""Observer: what the run achieved, on the screen and in `summary.json`."""

import json
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table

from grpo_lightning.run_folder import run_folder
from grpo_lightning.types import Stream


class RunSummary(Callback):
    """Evaluates before and after training, exports the policy, and says what came of the run and what to do next.

    ``<run folder>/summary.json`` holds the same, and ``<run folder>/policy`` is what `transformers` loads. A resumed
    run keeps the accuracy of its first beginning and counts on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.accuracy_before: float | None = None
        self.seconds_before = 0.0
        self._has_begun = False

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run cannot measure again."""
        return {"accuracy_before": self.accuracy_before, "wall_seconds": self._wall_seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the first beginning's accuracy and time."""
        self.accuracy_before, self.seconds_before = state_dict["accuracy_before"], state_dict["wall_seconds"]
        self._has_begun = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """The clock starts."""
        self._start = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what the policy can do before training."""
        if not self._has_begun:
            self.accuracy_before = _accuracy(trainer, pl_module)
            self._has_begun = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure again, export, write and print."""
        self._finish(trainer, pl_module, _accuracy(trainer, pl_module), is_interrupted=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """An interrupted run leaves what is known of it."""
        if self._has_begun and trainer.training:
            _write(trainer, self._facts(trainer, pl_module, None, is_interrupted=True))

    def _finish(self, trainer: Trainer, module: Any, accuracy: float | None, *, is_interrupted: bool) -> None:
        facts = self._facts(trainer, module, accuracy, is_interrupted=is_interrupted)
        if trainer.is_global_zero:
            folder = run_folder(trainer)
            module.export_policy(folder / "policy")
            _write(trainer, facts)
            _show(folder, facts)

    def _facts(self, trainer: Trainer, module: Any, accuracy: float | None, *, is_interrupted: bool) -> dict[str, Any]:
        return {
            "heldout_accuracy_before": self.accuracy_before,
            "heldout_accuracy_after": accuracy,
            "wall_seconds": round(self._wall_seconds(), 2),
            "seconds_by_phase": {name: round(value, 2) for name, value in module.seconds_by_phase.items()},
            "iterations": module.iteration,
            "optimizer_steps": trainer.global_step,
            "tokens_generated": module.tokens_generated,
            "tokens_trained": module.tokens_trained,
            "seed": module.seed,
            "interrupted": is_interrupted,
        }

    def _wall_seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - getattr(self, "_start", time.perf_counter())


def _accuracy(trainer: Trainer, module: Any) -> float | None:
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    loader = datamodule.val_dataloader() if datamodule is not None else None
    if not loader or not len(loader):
        return None
    return float(module.evaluate(loader, stream=Stream.VALIDATION)["accuracy"])


def _write(trainer: Trainer, facts: dict[str, Any]) -> None:
    if trainer.is_global_zero:
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").write_text(json.dumps(facts, indent=2) + "\n")


def _show(folder: Path, facts: dict[str, Any]) -> None:
    table = Table(title="The run", show_header=False)
    for name in ("heldout_accuracy_before", "heldout_accuracy_after"):
        value = facts[name]
        table.add_row(name.replace("_", " "), "-" if value is None else f"{value:.1%}")
    for name in ("iterations", "optimizer_steps", "tokens_generated", "tokens_trained", "wall_seconds"):
        table.add_row(name.replace("_", " "), f"{facts[name]:,}")
    for phase, seconds in facts["seconds_by_phase"].items():
        table.add_row(f"  {phase}", f"{seconds:.1f} s")
    table.add_row("artefacts", str(folder))
    table.add_row("talk to it", f"grpo-lightning chat {folder / 'policy'}")
    checkpoint = folder / "checkpoints" / "last.ckpt"
    table.add_row("evaluate it", f"grpo-lightning validate --config {folder / 'config.yaml'} --ckpt_path {checkpoint}")
    Console().print(table)

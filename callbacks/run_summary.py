"""Observer: what the run achieved, on the screen and in `summary.json`."""

import json
import math
import platform
import shlex
import time
from collections.abc import Mapping
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from rich import get_console
from rich.table import Table

from grpo_lightning.callbacks.throughput import summary_of
from grpo_lightning.policy import is_adapter
from grpo_lightning.run_folder import run_folder
from grpo_lightning.types import Stream

PACKAGES = ("grpo_lightning", "lightning", "torch", "transformers")


class RunSummary(Callback):
    """Evaluates before and after training, exports the policy, and says what came of the run and what to do next.

    The run folder gets ``policy/``, which transformers alone loads, and ``summary.json``. Both evaluations are of the
    prompts of `validate` (``trainer.limit_val_batches`` holds), and draw the same random numbers. Where a validation
    has just measured the final weights, it is not repeated. A resumed run keeps the accuracy of its first beginning
    and counts the seconds of all its parts. A run that broke off says so: its summary is not of the final weights, so
    it has no accuracy after training and exports nothing. `fast_dev_run` leaves nothing.
    """

    _folder: Path | None
    _before: dict[str, float] | None
    _after: dict[str, float] | None
    _validated: tuple[int, dict[str, float]]
    """The optimizer step of the last validation, and what it found."""
    _summary: dict[str, Any] | None
    _earlier_seconds: float
    """Of the parts of the run before this process."""
    _start: float

    def __init__(self) -> None:
        super().__init__()
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run cannot measure again."""
        return {"before": self._before, "wall_seconds": self._wall_seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the first beginning."""
        self._before, self._earlier_seconds = state_dict["before"], state_dict["wall_seconds"]
        self._is_resumed = True

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        """Start the clock, and settle on a folder while every rank answers."""
        if stage == "fit":
            self._forget()
            is_trial = trainer.fast_dev_run  # type: ignore[attr-defined]
            self._folder = None if is_trial else run_folder(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure what the policy can do before training."""
        self._has_begun = True
        if not self._is_resumed and self._folder is not None:
            self._before = _evaluate(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: ARG002
        """Keep what was measured: it may have been of the final weights."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            prefix = "validation/"
            logged = trainer.callback_metrics.items()
            found = {name.removeprefix(prefix): float(value) for name, value in logged if name.startswith(prefix)}
            self._validated = (trainer.global_step, found)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure again, export and write, before the strategy takes the model down."""
        if self._folder is None:
            return
        step, found = self._validated
        self._after = found if found and step == trainer.global_step else _evaluate(trainer, pl_module)
        self._summary = self._facts(trainer, pl_module, is_interrupted=False)
        if hasattr(pl_module, "export_policy"):
            pl_module.export_policy(self._folder / "policy")
        if trainer.is_global_zero:
            _write(self._folder, self._summary)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: ARG002
        """Print, when everything else has been said."""
        if trainer.is_global_zero and self._summary is not None and self._folder is not None:
            show(self._folder, self._summary)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:  # noqa: ARG002
        """A run that broke off leaves what is known of it. Other ranks may be gone: nothing is asked of them."""
        if self._has_begun and self._folder is not None and trainer.is_global_zero:
            _write(self._folder, self._facts(trainer, pl_module, is_interrupted=True))

    def _facts(self, trainer: Trainer, module: Any, *, is_interrupted: bool) -> dict[str, Any]:
        before, after = self._before or {}, self._after or {}
        parameters = list(getattr(module, "policy", module).parameters())
        return {
            "heldout_accuracy_before": _accuracy(before),
            "heldout_accuracy_after": _accuracy(after),
            "heldout_prompts": _whole(after.get("num_prompts", before.get("num_prompts"))),
            "heldout_before": _rounded(before),
            "heldout_after": _rounded(after),
            "wall_seconds": round(self._wall_seconds(), 2),
            "seconds_by_phase": _rounded(getattr(module, "seconds_by_phase", {}), digits=2),
            "iterations": getattr(module, "iteration", None),
            "optimizer_steps": trainer.global_step,
            "tokens_generated": getattr(module, "tokens_generated", None),
            "tokens_trained": getattr(module, "tokens_trained", None),
            "throughput": _significant(summary_of(trainer)),
            "parameters": sum(p.numel() for p in parameters),
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "interrupted": is_interrupted,
            "seed": getattr(module, "seed", None),
            "ranks": trainer.world_size,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        }

    def _forget(self) -> None:
        self._folder = None
        self._before = None
        self._after = None
        self._validated = (-1, {})
        self._summary = None
        self._is_resumed = False
        self._has_begun = False
        self._earlier_seconds = 0.0
        self._start = time.perf_counter()

    def _wall_seconds(self) -> float:
        return self._earlier_seconds + time.perf_counter() - self._start


def show(folder: Path, summary: Mapping[str, Any]) -> None:
    """Print a run's summary, and the commands that go on from it."""
    console = get_console()
    table = Table(title="The run", title_justify="left", show_header=False)
    before, after = summary["heldout_accuracy_before"], summary["heldout_accuracy_after"]
    if before is not None or after is not None:
        prompts = summary["heldout_prompts"]
        table.add_row("held-out accuracy" + (f", {prompts:,} prompts" if prompts else ""), _change(before, after))
    for name in ("iterations", "optimizer_steps", "tokens_generated", "tokens_trained"):
        if summary[name] is not None:
            table.add_row(name.replace("_", " "), f"{summary[name]:,}")
    table.add_row("seconds", f"{summary['wall_seconds']:,.1f}")
    for phase, seconds in summary["seconds_by_phase"].items():
        table.add_row(f"  {phase}", f"{seconds or 0:,.1f}")
    for name, value in summary.get("throughput", {}).items():
        if name.startswith("throughput/"):
            table.add_row(name.removeprefix("throughput/").replace("_", " "), f"{value:,.3g}")
    console.print(table)
    for what, words in commands(folder).items():
        # Not wrapped, so that it can be copied.
        console.print(f"{what:<13}{words}", soft_wrap=True, highlight=False, markup=False)


def commands(folder: Path) -> dict[str, str]:
    """Where the artefacts of the run in `folder` lie, and how to evaluate its policy and talk to it."""
    lines = {"artefacts:": str(folder)}
    policy, config = folder / "policy", folder / "config.yaml"
    if policy.is_dir():
        lines["talk to it:"] = shlex.join(["grpo-lightning", "chat", str(policy)])
    if is_adapter(policy):
        lines["merge it:"] = shlex.join(["grpo-lightning", "merge", str(policy), str(folder / "merged")])
    if policy.is_dir() and config.is_file():
        source = ["--model.policy=PretrainedPolicy", f"--model.policy.path={policy}"]
        source += ["--model.lora=null"] if is_adapter(policy) else []
        lines["evaluate it:"] = shlex.join(["grpo-lightning", "validate", "--config", str(config), *source])
    return lines


def _evaluate(trainer: Trainer, module: Any) -> dict[str, float] | None:
    """The metrics on the prompts of `validate`; None where there is nothing to evaluate, or with."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if datamodule is None or not hasattr(module, "evaluate"):
        return None
    loader = datamodule.val_dataloader()
    limit = trainer.limit_val_batches
    num_batches = min(limit, len(loader)) if isinstance(limit, int) else int(limit * len(loader))
    if not num_batches:
        return None
    metrics: dict[str, float] = module.evaluate(islice(loader, num_batches), stream=Stream.VALIDATION)
    return metrics


def _accuracy(metrics: Mapping[str, float]) -> float | None:
    """Of the greedy completions, or pass@1 where none were asked for."""
    rounded = _rounded(metrics)
    return rounded.get("accuracy", rounded.get("pass@1"))


def _rounded(values: Mapping[str, float], digits: int = 6) -> dict[str, float | None]:
    """Logged metrics are fp32; NaN, a mean of nothing, has no place in JSON."""
    return {name: None if math.isnan(value) else round(float(value), digits) for name, value in values.items()}


def _significant(values: Mapping[str, float | bool]) -> dict[str, float | bool]:
    """Of numbers from ratios to operations per second, the first six digits."""
    return {name: value if isinstance(value, bool) else float(f"{value:.6g}") for name, value in values.items()}


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _change(before: float | None, after: float | None) -> str:
    return " → ".join("-" if value is None else f"{value:.1%}" for value in (before, after))


def _write(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json` whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / ".summary.json"
    unfinished.write_text(json.dumps(summary, indent=2) + "\n")
    unfinished.replace(folder / "summary.json")

"""The phases of an iteration: how long each takes, and which one is at work."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import LightningModule, Trainer


@contextmanager
def timed_phase(
    name: str, seconds_by_phase: dict[str, float], *, trainer: Trainer, module: LightningModule
) -> Iterator[None]:
    """Add the seconds of a phase to `seconds_by_phase`, also where it raises.

    The Trainer's callbacks that have a method ``on_phase(trainer, module, name)`` are called at the beginning, before
    the clock starts, and with None for a name at the end. The Trainer's profiler has the phase as ``[phase]name``.
    """
    watchers = [c for c in trainer.callbacks if hasattr(c, "on_phase")]  # type: ignore[attr-defined]
    for callback in watchers:
        callback.on_phase(trainer, module, name)
    start = time.perf_counter()
    try:
        with trainer.profiler.profile(f"[phase]{name}"):  # type: ignore[attr-defined]
            yield
    finally:
        seconds_by_phase[name] = seconds_by_phase.get(name, 0.0) + time.perf_counter() - start
        for callback in watchers:
            callback.on_phase(trainer, module, None)

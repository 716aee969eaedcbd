"""How long each framework trains until it is right on so many held-out problems: the quickstart's task.

All begin with the same weights and make blocks of updates in turn. Only the updates are timed. Where the processor
multiplies bf16, ours learns with bf16 compute as well.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tools.benchmark.machine import multiplies_bf16
from tools.benchmark.measure import OURS, OURS_BF16, TRL, Conditions
from tools.benchmark.protocol import Worker
from tools.benchmark.quickstart import MAX_STEPS

TARGET_ACCURACY = 0.9


@dataclass(kw_only=True)
class Curve:
    """How one framework learns: after so many seconds and updates, which accuracy."""

    accuracies: list[float]
    seconds: list[float] = field(default_factory=lambda: [0.0])
    updates: list[int] = field(default_factory=lambda: [0])

    @property
    def has_arrived(self) -> bool:
        """Whether the target is reached."""
        return self.accuracies[-1] >= TARGET_ACCURACY

    @property
    def seconds_to_target(self) -> float:
        """Infinity where it never arrived; no finer than a block."""
        return self.seconds[-1] if self.has_arrived else float("inf")


def learn(conditions: Conditions, folder: Path, *, block: int = 1, max_updates: int = MAX_STEPS) -> dict[str, Curve]:
    """Train each until it reaches `TARGET_ACCURACY` on the held-out problems, or `max_updates`.

    Args:
        conditions: Of the whole run.
        folder: The policy of the cold start.
        block: Updates between two judgements.
        max_updates: Of each.

    Raises:
        BusyMachineError: Somebody else computes.
    """
    with ExitStack() as stack:
        names = [OURS, TRL, *([OURS_BF16] if multiplies_bf16() else [])]
        workers = {name: stack.enter_context(_worker(name, conditions, folder)) for name in names}
        for worker in workers.values():
            worker.wait_until_ready()
        curves = {name: Curve(accuracies=[worker.ask("accuracy")]) for name, worker in workers.items()}
        for _ in range(max_updates // block):
            _train_round(workers, curves, block, conditions.before_round)
    return curves


def _train_round(
    workers: Mapping[str, Worker], curves: Mapping[str, Curve], block: int, before: Callable[[], None]
) -> None:
    """A block of updates of everybody who has not arrived."""
    for name, curve in curves.items():
        if curve.has_arrived:
            continue
        before()
        seconds = sum(workers[name].ask("step", ()).seconds for _ in range(block))
        curve.seconds.append(curve.seconds[-1] + seconds)
        curve.updates.append(curve.updates[-1] + block)
        curve.accuracies.append(workers[name].ask("accuracy"))


def _worker(name: str, conditions: Conditions, folder: Path) -> Worker:
    return Worker(
        "tools.benchmark.quickstart_trl" if name == TRL else "tools.benchmark.quickstart_ours",
        python=conditions.trl_python if name == TRL else conditions.our_python,
        arguments=[str(folder), *(["--precision", "bf16-mixed"] if name == OURS_BF16 else [])],
        num_threads=conditions.num_threads,
    )

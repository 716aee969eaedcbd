"""The cells of the parity table: what ranks run, what one process runs, and how far the two may be apart.

A cell is a strategy on some ranks, and a check. All runs learn from one recorded rollout of ragged lengths, or draw
from their own weights where a check says so, with a schedule, a KL penalty, and two updates per rollout.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any, ClassVar

STRATEGIES = ("single", "ddp", "fsdp2", "deepspeed_1", "deepspeed_2", "deepspeed_3")
RANKS = (1, 2, 4)
GROUP_SIZE = 4

TRAINED: dict[str, dict[str, Any]] = {"full": {}, "LoRA": {"lora": {"rank": 3}, "lr": 3e-2}}
RUN: dict[str, Any] = {
    "num_epochs": 2,
    "iterations": 5,
    "schedule": {"warmup_steps": 2, "decay": "linear"},
    # Both clips act: that of the ratio in every second update, that of the gradient in every update.
    "clip": 0.01,
    "gradient_clip_val": 0.05,
}

# What fp32 allows: sums of the same numbers in another order. Stage 3 of ZeRO sums them once more.
GRADIENT_TOLERANCE, GRADIENT_TOLERANCE_OF_STAGE_3 = 1e-6, 5e-6
# Adam divides by the root of the squared gradient, which amplifies rounding where a gradient is nearly zero.
WEIGHT_TOLERANCE = 1e-4
# Log-probabilities here are about -2.5, with a last digit of 2.4e-7 in fp32. A metric below 0.1 is a difference of such
# numbers, and as good as they are: a few of those digits, 1e-6.
METRIC_TOLERANCE, SMALL_METRIC = 1e-5, 0.1
MEMORY_TOLERANCE = 0.15


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How far ranks are from one process."""

    name: str
    value: float
    tolerance: float

    @property
    def is_met(self) -> bool:
        return self.value <= self.tolerance


Told = Mapping[str, Any]
"""What `replay.told` returns."""


class Check(ABC):
    """What is compared. A subclass's fields are the columns that it adds to a cell."""

    name: ClassVar[str]
    has_second_update_from_one: ClassVar[bool] = False
    """Whether the second update on ranks begins with the weights that one process has then."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Of the run on ranks, but for strategy and ranks."""

    @property
    def one_process(self) -> dict[str, Any]:
        """Of the run in one process."""
        return self.settings

    def why_not(self, strategy: str, ranks: int) -> str | None:
        """The reason why it does not apply."""
        return "one process is one rank" if strategy == "single" and ranks > 1 else None

    @abstractmethod
    def measures(self, strategy: str, of_ranks: Sequence[Told], one: Told) -> list[Measure]:
        """The worst over ranks."""


@dataclass(frozen=True)
class Replay(Check):
    """Gradients, weights and metrics of the recorded rollout, laid out and accumulated in this way or that.

    The first two gradients are of equal weights, to the bit: without and with what is clipped and penalised.
    """

    accumulate: int
    trained: str
    layout: str
    name: ClassVar[str] = "replay"
    has_second_update_from_one: ClassVar[bool] = True

    @property
    def settings(self) -> dict[str, Any]:
        return {**RUN, **TRAINED[self.trained], "accumulate": self.accumulate, "layout": self.layout}

    @property
    def one_process(self) -> dict[str, Any]:
        return {**RUN, **TRAINED[self.trained], "accumulate": 1, "layout": "padded"}

    def measures(self, strategy: str, of_ranks: Sequence[Told], one: Told) -> list[Measure]:
        tolerance = GRADIENT_TOLERANCE_OF_STAGE_3 if strategy == "deepspeed_3" else GRADIENT_TOLERANCE
        moved = (one["weights"][-1] - one["weights"][0]).norm()
        pairs = [(rank["weights"][i], one["weights"][i]) for rank in of_ranks for i in (0, -1)]
        weights = max(float((mine - theirs).norm() / moved) for mine, theirs in pairs)
        return [
            Measure(name="gradient", value=_gradients_apart(of_ranks, one, num_updates=2), tolerance=tolerance),
            Measure(name="weights", value=weights, tolerance=WEIGHT_TOLERANCE),
            Measure(name="metrics", value=_metrics_apart(of_ranks, one), tolerance=METRIC_TOLERANCE),
        ]


@dataclass(frozen=True)
class FreeRunning(Check):
    """Ranks that draw from their own weights, in fp64: the tokens of one process, all of them."""

    name: ClassVar[str] = "free-running in fp64"

    @property
    def settings(self) -> dict[str, Any]:
        return {**RUN, "dtype": "float64", "live": True, "accumulate": 2}

    def why_not(self, strategy: str, ranks: int) -> str | None:
        if strategy.startswith("deepspeed"):
            return "DeepSpeed steps in fp32 whatever the precision of the policy"
        return super().why_not(strategy, ranks)

    def measures(self, strategy: str, of_ranks: Sequence[Told], one: Told) -> list[Measure]:
        differing = len(_drawn(of_ranks) ^ _drawn([one]))
        return [Measure(name="other completions", value=differing, tolerance=0)]


@dataclass(frozen=True)
class Uneven(Check):
    """Ranks of which every second one draws a token alone and is done at once: nobody waits for it for ever."""

    name: ClassVar[str] = "uneven rollouts"

    @property
    def settings(self) -> dict[str, Any]:
        return {**RUN, "uneven": True, "iterations": 2}

    def why_not(self, strategy: str, ranks: int) -> str | None:
        return "no other rank to wait for" if ranks == 1 else super().why_not(strategy, ranks)

    def measures(self, strategy: str, of_ranks: Sequence[Told], one: Told) -> list[Measure]:
        assert all({len(ids) for ids in rank["tokens"]} == {1} for rank in of_ranks[1::2])
        assert all(max(len(ids) for ids in rank["tokens"]) > 1 for rank in of_ranks[0::2])
        tolerance = GRADIENT_TOLERANCE_OF_STAGE_3 if strategy == "deepspeed_3" else GRADIENT_TOLERANCE
        return [Measure(name="gradient", value=_gradients_apart(of_ranks, one, num_updates=1), tolerance=tolerance)]


@dataclass(frozen=True)
class Memory(Check):
    """Bytes of weights, gradients and optimizer states, while all three are there: a share of those of one process."""

    name: ClassVar[str] = "memory"

    @property
    def settings(self) -> dict[str, Any]:
        # The second update, by when there are states; a width at which the filling up of shards does not count.
        return {**RUN, "iterations": 1, "head_dim": 32}

    def why_not(self, strategy: str, ranks: int) -> str | None:
        if strategy not in ("fsdp2", "deepspeed_3"):
            return "each rank has whole weights"
        return "one rank has all shards" if ranks == 1 else None

    def measures(self, strategy: str, of_ranks: Sequence[Told], one: Told) -> list[Measure]:
        ranks = len(of_ranks)
        return [
            Measure(
                name=kind,
                value=max(abs(rank["held_bytes"][kind] * ranks / whole - 1) for rank in of_ranks),
                tolerance=MEMORY_TOLERANCE,
            )
            for kind, whole in one["held_bytes"].items()
        ]


@dataclass(frozen=True)
class Cell:
    """A strategy on some ranks, and what is compared."""

    strategy: str
    ranks: int
    check: Check

    def __str__(self) -> str:
        return "-".join([self.strategy, str(self.ranks), self.check.name, *map(str, self.columns.values())])

    @property
    def columns(self) -> dict[str, Any]:
        """The settings of the check."""
        return {field.name: getattr(self.check, field.name) for field in fields(self.check)}

    @property
    def row(self) -> dict[str, Any]:
        """What its row of the table begins with."""
        return {"strategy": self.strategy, "ranks": self.ranks, "check": self.check.name, **self.columns}

    @property
    def why_not(self) -> str | None:
        """The reason why it does not apply."""
        return self.check.why_not(self.strategy, self.ranks)

    @property
    def settings(self) -> dict[str, Any]:
        """Of `replay.in_world`. Stage 3 cuts small weights too, for there are no others."""
        if self.strategy == "deepspeed_3":
            cut = {"stage": 3, "zero_settings": {"stage3_param_persistence_threshold": 0}}
            return {**self.check.settings, "zero": cut}
        return {**self.check.settings, "strategy": "auto" if self.strategy == "single" else self.strategy}


REPLAYS = [Replay(*columns) for columns in product((1, 4), TRAINED, ("padded", "packed", "shared_prefix"))]
CHECKS: list[Check] = [*REPLAYS, FreeRunning(), Uneven(), Memory()]
CELLS = [Cell(*columns) for columns in product(STRATEGIES, RANKS, CHECKS)]

FEW = [
    Cell("single", 1, Replay(4, "full", "shared_prefix")),
    Cell("single", 1, Replay(4, "LoRA", "packed")),
    Cell("single", 2, Replay(1, "full", "padded")),
    Cell("ddp", 2, Replay(4, "full", "packed")),
    Cell("ddp", 2, FreeRunning()),
    Cell("fsdp2", 1, Replay(4, "full", "padded")),
    Cell("fsdp2", 2, Replay(1, "LoRA", "shared_prefix")),
    Cell("fsdp2", 2, FreeRunning()),
    Cell("fsdp2", 2, Uneven()),
    Cell("fsdp2", 2, Memory()),
    Cell("deepspeed_1", 2, Replay(4, "full", "padded")),
    Cell("deepspeed_2", 2, Replay(4, "LoRA", "packed")),
    Cell("deepspeed_3", 2, Replay(1, "LoRA", "packed")),
    Cell("deepspeed_3", 2, Uneven()),
    Cell("deepspeed_3", 2, Memory()),
    Cell("deepspeed_3", 2, FreeRunning()),
    Cell("deepspeed_3", 4, Replay(4, "full", "shared_prefix")),
]
"""Each strategy, layout, accumulation and check once at least, on 1, 2 and 4 ranks."""


def _gradients_apart(of_ranks: Sequence[Told], one: Told, *, num_updates: int) -> float:
    """Relative L2 of the first gradients before clipping."""
    theirs = one["gradients"][:num_updates]
    pairs = [pair for rank in of_ranks for pair in zip(rank["gradients"][:num_updates], theirs, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def _metrics_apart(of_ranks: Sequence[Told], one: Told) -> float:
    """Of all metrics of all updates, the largest difference, relative but for small ones."""
    apart = 0.0
    for rank in of_ranks:
        for mine, theirs in zip(rank["metrics"], one["metrics"], strict=True):
            assert mine.keys() == theirs.keys()
            apart = max([apart, *(abs(mine[k] - v) / max(abs(v), SMALL_METRIC) for k, v in theirs.items())])
    return apart


def _drawn(of_ranks: Sequence[Told]) -> set[tuple[Any, ...]]:
    """The completions of the last iteration, each with its slot and number."""
    return {
        (slot, sample, tuple(rank["tokens"][p * GROUP_SIZE + sample]))
        for rank in of_ranks
        for p, slot in enumerate(rank["slots"])
        for sample in range(GROUP_SIZE)
    }

"""Strategies of Lightning's own that are known not to fit, under their names."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch.strategies import Strategy

from grpo_lightning.types import ConfigurationError

ZERO = "is Lightning's own, whose rollouts and checkpoints do not fit; set deepspeed_1, deepspeed_2 or deepspeed_3."
FSDP1 = "is Lightning's older FSDP, whose rollouts, clipping and checkpoints do not fit; set fsdp2, or fsdp1."
SPAWN = "gives its ranks a pickled run, and runs here cannot be pickled; set ddp."

REASONS = {
    **dict.fromkeys(
        (
            "deepspeed",
            "deepspeed_stage_1",
            "deepspeed_stage_2",
            "deepspeed_stage_2_offload",
            "deepspeed_stage_3",
            "deepspeed_stage_3_offload",
            "deepspeed_stage_3_offload_nvme",
        ),
        ZERO,
    ),
    **dict.fromkeys(
        ("ddp_spawn", "ddp_spawn_find_unused_parameters_false", "ddp_spawn_find_unused_parameters_true"), SPAWN
    ),
    **dict.fromkeys(("fsdp", "fsdp_cpu_offload"), FSDP1),
}
"""Why not, and what instead, by name."""


def refused(name: str) -> Callable[..., Strategy]:
    """What stands for a strategy under its name.

    Args:
        name: Of `REASONS`.
    """

    def refuse(**_: Any) -> Strategy:
        raise ConfigurationError(f"trainer.strategy: {name} {REASONS[name]}")

    return refuse

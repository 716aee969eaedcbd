"""Settings of torch.distributed that the strategies here share."""

import math
from datetime import timedelta

from torch import distributed

from grpo_lightning.types import ConfigurationError

TIMEOUT_SECONDS = 1800.0
"""After how long ranks give up waiting for each other: torch's own default for gloo, and Lightning's for all."""


def check_backend(backend: str | None) -> None:
    """The backend is one of torch.distributed that is installed, or one for each device (`cpu:gloo,cuda:nccl`).

    Raises:
        ConfigurationError: It is not.
    """
    for part in backend.split(",") if backend is not None else ():
        name = part.rsplit(":", 1)[-1].lower()
        if name == distributed.Backend.UNDEFINED or not distributed.is_backend_available(name):
            raise ConfigurationError(
                f"trainer.strategy.process_group_backend must be null for what suits the device, or one of torch's "
                f"that are installed ({', '.join(_available())}), got {backend}."
            )


def timeout_of(seconds: float) -> timedelta:
    """What Lightning is given.

    Args:
        seconds: The setting `trainer.strategy.timeout_seconds`.

    Raises:
        ConfigurationError: No time is left.
    """
    if not 0 < seconds < math.inf:
        raise ConfigurationError(f"trainer.strategy.timeout_seconds must be > 0 and finite, got {seconds}.")
    return timedelta(seconds=seconds)


def give_up_after(timeout: timedelta, group: distributed.ProcessGroup) -> None:
    """Let the ranks of a group give up when the others do: one made beside the first has torch's own timeout.

    See https://github.com/pytorch/pytorch/blob/main/torch/distributed/distributed_c10d.py, `new_group`.
    """
    distributed.distributed_c10d._set_pg_timeout(timeout, group)


def _available() -> list[str]:
    unusable = (distributed.Backend.UNDEFINED, "fake")
    return [
        name
        for name in distributed.Backend.backend_list
        if name not in unusable and distributed.is_backend_available(name)
    ]

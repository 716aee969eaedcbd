"""Settings of torch.distributed that the strategies here share."""

from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import Strategy
from torch import distributed

from grpo_lightning.types import ConfigurationError

TIMEOUT_SECONDS = 1800.0
"""After how long ranks give up waiting for each other: torch's own default for gloo, and Lightning's for all."""

_YEAR = 365 * 24 * 3600
_UNUSABLE = (distributed.Backend.UNDEFINED, "fake")
"""What torch lists, and by which ranks do not communicate."""


def check_backend(backend: str | None) -> None:
    """The backend is one of torch.distributed that is installed, or one for each device (`cpu:gloo,cuda:nccl`).

    Raises:
        ConfigurationError: It is not, or ranks would not communicate by it.
    """
    for device, name in _parts(backend):
        if name in _UNUSABLE or not distributed.is_backend_available(name) or device not in ("", *_devices_of(name)):
            raise ConfigurationError(
                f"trainer.strategy.process_group_backend must be null for what suits the device, or one of torch's "
                f"that are installed ({', '.join(_available())}), got {backend}."
            )


def check_communication(strategy: Strategy) -> None:
    """Ranks can be started and exchange what lies on their devices, also under a strategy of Lightning's own.

    Raises:
        ConfigurationError: The strategy's backend is not there, or is not for the device; or its ranks are given what
            cannot be pickled.
    """
    start_method = getattr(strategy, "_start_method", None)
    if start_method in ("spawn", "forkserver"):
        raise ConfigurationError(
            f"trainer.strategy.start_method: {start_method} gives ranks a pickled run, and this one cannot be pickled. "
            "Set popen."
        )
    backend = getattr(strategy, "_process_group_backend", None)
    check_backend(backend)
    device = strategy.root_device.type
    if backend is not None and not any(device in ((on,) if on else _devices_of(name)) for on, name in _parts(backend)):
        raise ConfigurationError(
            f"trainer.strategy.process_group_backend: {backend} exchanges nothing that lies on a device of the kind "
            f"{device}. Set null for what suits it."
        )


def timeout_of(seconds: Any) -> timedelta:
    """What Lightning is given.

    Args:
        seconds: The setting `trainer.strategy.timeout_seconds`.

    Raises:
        ConfigurationError: It is no number in [1, one year].
    """
    if not isinstance(seconds, int | float) or not 1 <= seconds <= _YEAR:
        raise ConfigurationError(
            f"trainer.strategy.timeout_seconds must be in [1, {_YEAR}], which is a year, got {seconds}."
        )
    return timedelta(seconds=seconds)


def give_up_after(timeout: timedelta, group: distributed.ProcessGroup) -> None:
    """Let the ranks of a group give up when the others do: one made beside the first has torch's own timeout.

    See https://github.com/pytorch/pytorch/blob/main/torch/distributed/distributed_c10d.py, `new_group`.
    """
    distributed.distributed_c10d._set_pg_timeout(timeout, group)


def _parts(backend: str | None) -> list[tuple[str, str]]:
    """Device and backend of each part; a device that is not named is empty."""
    parts = [part.strip().lower().rpartition(":") for part in backend.split(",")] if backend is not None else []
    return [(device, name) for device, _, name in parts]


def _devices_of(name: str) -> list[str]:
    return distributed.Backend.backend_capability.get(name, [])


def _available() -> list[str]:
    return [
        name
        for name in distributed.Backend.backend_list
        if name not in _UNUSABLE and distributed.is_backend_available(name)
    ]

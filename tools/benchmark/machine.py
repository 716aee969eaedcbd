"""The machine: what it is, and whether anybody else is using it."""

import os
import platform
import time
from pathlib import Path

import torch

MAX_BUSY_SHARE = 0.05
MAX_LOAD = 0.3


class BusyMachineError(RuntimeError):
    """Somebody else computes: no timing taken now would mean anything."""


def describe() -> dict[str, str | int | bool]:
    """What a reader of the figures must know of it."""
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "multiplies_bf16": multiplies_bf16(),
        "system": platform.platform(),
    }


def multiplies_bf16() -> bool:
    """Whether the processor has instructions for products in bf16; else they are emulated, many times slower."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def require_quiet(*, seconds: float = 1.0, num_trials: int = 10) -> None:
    """Wait until the processors idle while we do.

    Raises:
        BusyMachineError: They did in none of `num_trials` spells of `seconds`.
    """
    share = 1.0
    for _ in range(num_trials):
        share = min(share, busy_share(seconds=seconds))
        if share <= MAX_BUSY_SHARE:
            return
    raise BusyMachineError(
        f"The processors are {share:.0%} busy while the benchmark waits, expected at most {MAX_BUSY_SHARE:.0%}."
    )


def require_low_load(*, num_trials: int = 60) -> None:
    """Wait until nothing has run for a minute; for the beginning, before the benchmark itself has computed.

    Raises:
        BusyMachineError: The load average says that something runs, in each of `num_trials`, five seconds apart.
    """
    load = 1.0
    for trial in range(num_trials):
        if trial:
            time.sleep(5)
        load = os.getloadavg()[0] / len(os.sched_getaffinity(0))
        if load <= MAX_LOAD:
            return
    raise BusyMachineError(f"The load average of a minute is {load:.2f} per core, expected at most {MAX_LOAD}.")


def busy_share(*, seconds: float) -> float:
    """The share of processor time that was used while this process slept."""
    before = _processor_times()
    time.sleep(seconds)
    idle, total = (after - earlier for after, earlier in zip(_processor_times(), before, strict=True))
    return 1 - idle / max(total, 1)


def _processor_times() -> tuple[int, int]:
    """Idle and total time, in ticks, over all processors."""
    ticks = [int(field) for field in _lines("/proc/stat")[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()

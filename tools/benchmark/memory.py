"""The resident memory of this process, in bytes."""

from pathlib import Path


def reset_peak() -> None:
    """Let `peak` begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most since `reset_peak`, or since the process began."""
    return _status("VmHWM")


def current() -> int:
    """Now."""
    return _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

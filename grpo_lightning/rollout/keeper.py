"""Runs a command until it ends, or until the process that wanted it is gone: ``python keeper.py PID COMMAND...``.

A file of its own that imports nothing of ours, so that it is small in memory and there at once.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

_GRACE_SECONDS = 10


def keep(parent: int, command: list[str]) -> int:
    """Run a command in a session of its own; end all of its processes when `parent` ends, however it does.

    Returns:
        The command's exit status.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    child = subprocess.Popen(command, start_new_session=True)
    try:
        while child.poll() is None and os.getppid() == parent:
            time.sleep(0.1)
    finally:
        _end(child)
    return child.returncode


def _end(child: "subprocess.Popen[bytes]") -> None:
    """Ask all processes of the session to end, then make them."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE_SECONDS)
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


if __name__ == "__main__":
    sys.exit(keep(int(sys.argv[1]), sys.argv[2:]))

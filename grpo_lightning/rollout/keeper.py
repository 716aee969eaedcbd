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
        The command's exit status; 0 where this process was asked to end.
    """
    asked: list[int] = []  # and no exception, which would lose a child that is just being started
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    child = subprocess.Popen(command, start_new_session=True)
    try:
        while child.poll() is None and os.getppid() == parent and not asked:
            time.sleep(0.1)
    finally:
        _end(child)
    return 0 if asked else child.returncode


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

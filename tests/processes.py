"""Worlds that are started as users start them, and what becomes of their processes."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
LAUNCHERS = {
    "lightning": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}
START_SECONDS = 180


class World:
    """The processes of a run.

    Args:
        folder: Of its files; it runs there.
        command: That starts it.
        environment: Further variables.
    """

    def __init__(self, folder, command, **environment):
        self.folder = folder
        self.mark = f"GRPO_LIGHTNING_WORLD={folder}"
        paths = [HERE.parent, HERE, *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "GRPO_LIGHTNING_WORLD": str(folder),
            **environment,
        }
        with (folder / "log").open("ab") as log:
            self.first = subprocess.Popen(
                list(map(str, command)),
                cwd=folder,
                env={**os.environ, **variables},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def printed(self):
        return (self.folder / "log").read_text()

    def processes(self):
        """Of all that were started for it, those that are still there."""
        alive = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                is_ours = self.mark in (process / "environ").read_bytes().decode(errors="replace").split("\0")
                state = (process / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if is_ours and state != "Z":
                alive.append(int(process.name))
        return alive

    def wait_for(self, *names):
        """Until these files are there: what they say."""
        deadline = time.monotonic() + START_SECONDS
        files = [self.folder / name for name in names]
        while not all(file.exists() for file in files):
            assert self.first.poll() is None, self.printed[-3000:]
            assert time.monotonic() < deadline, self.printed[-3000:]
            time.sleep(0.05)
        return [file.read_text() for file in files]

    def end_within(self, seconds):
        """Until no process is left: the status of the first."""
        deadline = time.monotonic() + seconds
        while self.first.poll() is None or self.processes():
            assert time.monotonic() < deadline, f"{self.processes()} are left\n{self.printed[-3000:]}"
            time.sleep(0.1)
        return self.first.wait()

    def kill(self):
        for process in self.processes():
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.first.wait()


@contextmanager
def world(folder, launcher="lightning", environment=None, **settings):
    """A world of `eventful.main`."""
    folder.mkdir(exist_ok=True)
    command = [*LAUNCHERS[launcher], HERE / "eventful.py", folder, json.dumps({"ranks": 2, **settings})]
    started = World(folder, command, **(environment or {}))
    try:
        yield started
    finally:
        started.kill()

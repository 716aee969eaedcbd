"""A real vLLM server that is killed in the middle of a rollout, and what becomes of the run."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import replay
import torch
from real_server import ONE_BY_ONE, kill, needs_vllm

from grpo_lightning.rollout import VLLMServerEngine, keeper


class KillingEngine(VLLMServerEngine):
    """Kills all processes of its server, by SIGKILL, when the fifth completion of the third rollout is asked for."""

    num_asked = 0
    versions = ()

    def _complete(self, *arguments):
        self.num_asked += 1
        if self.num_asked == 2 * 16 + 5:
            kill(self)
        return super()._complete(*arguments)

    def generate(self, requests, sampling, coordinates):
        completions = super().generate(requests, sampling, coordinates)
        self.versions = (*self.versions, {completion.weight_version for completion in completions})
        return completions


@needs_vllm
def test_a_VLLM_that_is_killed_in_a_rollout_changes_nothing(caplog):
    caplog.set_level("INFO")
    settings = {"head_dim": 32, "iterations": 4, "lr": 1e-3}
    runs = [
        replay.run(engine=partial(kind, local=ONE_BY_ONE, max_requests=1), **settings)
        for kind in (VLLMServerEngine, KillingEngine)
    ]
    (undisturbed, _), (killed, module) = runs
    assert torch.equal(undisturbed.weights[-1], killed.weights[-1])
    assert module.engine.versions == ({0}, {1}, {2}, {3})
    assert module.engine.num_asked >= 4 * 16 + 5  # the third rollout whole once more
    said = [line for line in caplog.messages if "thrown away" in line or "started again" in line]
    assert len(said) == 2
    assert said[0].startswith("A rollout is thrown away and drawn again from weights that are sent again: ")
    assert said[1] == "A vLLM server has ended; it is started again."


def is_running(pid):
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM], ids=lambda end: end.name)
def test_a_kept_command_ends_with_who_wanted_it(tmp_path, end):
    # A shell with a child of its own, as a server has; it wants to live for a minute.
    pids = tmp_path / "pids"
    command = ["bash", "-c", f"sleep 60 & echo $$ $! > {pids}; wait"]
    parent = subprocess.Popen([sys.executable, "-c", f"""
import os, subprocess, sys
subprocess.Popen([sys.executable, {keeper.__file__!r}, str(os.getpid()), *{command!r}]).wait()
"""])  # fmt: skip
    wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    kept = [int(pid) for pid in pids.read_text().split()]
    assert all(map(is_running, kept))
    parent.send_signal(end)
    parent.wait()
    wait_until(lambda: not any(map(is_running, kept)))


def test_a_keeper_that_is_asked_to_end_ends_its_command(tmp_path):
    pids = tmp_path / "pids"
    command = ["bash", "-c", f"echo $$ > {pids}; sleep 60"]
    kept = subprocess.Popen([sys.executable, keeper.__file__, str(os.getpid()), *command])
    wait_until(lambda: pids.exists() and pids.read_text().strip())
    kept.terminate()
    kept.wait()
    assert not is_running(int(pids.read_text()))


def test_a_keeper_ends_when_its_command_does():
    assert subprocess.run([sys.executable, keeper.__file__, str(os.getpid()), "bash", "-c", "exit 3"]).returncode == 3

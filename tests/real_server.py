"""A real vLLM server for tests, and its end."""

import os
import signal
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

from grpo_lightning.rollout.local_servers import LocalServers

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

# One at a time, in a fixed order: then nothing but the weights and the seeds has a say in the last bits.
ONE_BY_ONE = LocalServers(kv_cache_gib=0.1, arguments=["--enforce-eager", "--max-num-seqs", "1"])


def kill(engine):
    """End all processes of an engine's one server, by SIGKILL."""
    (member,) = engine._launched.members
    for process in children(member._process.pid):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def children(pid):
    """All processes below one."""
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [descendant for child in found for descendant in (*children(child), child)]

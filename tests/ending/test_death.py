"""A rank that dies, or raises, ends its run: under every launcher that one machine allows, whatever the others do."""

import os
import re
import signal
import time

import pytest
from processes import world

from grpo_lightning.ending.link import SILENT_SECONDS

pytestmark = pytest.mark.slow

LIMIT_SECONDS = 60

KILLED = [
    ("lightning", "ddp", 1, "generate"),
    ("lightning", "ddp", 0, "generate"),
    ("lightning", "ddp", 1, "update"),
    ("lightning", "ddp", 0, "update"),
    ("lightning", "fsdp2", 1, "generate"),
    ("lightning", "fsdp2", 0, "update"),
    ("lightning", "deepspeed_2", 0, "generate"),
    ("lightning", "deepspeed_2", 1, "update"),
    ("lightning", "deepspeed_3", 0, "generate"),
    ("lightning", "deepspeed_3", 1, "update"),
    ("torchrun", "ddp", 0, "generate"),
    ("torchrun", "ddp", 1, "update"),
    ("torchrun", "fsdp2", 1, "generate"),
    ("torchrun", "deepspeed_3", 0, "update"),
]
SLOW_SECONDS = 5
TIMEOUT_SECONDS = 45  # in which a rank starts, however busy the machine is: the others wait for that too
RAISED = [("lightning", "ddp", 0), ("lightning", "ddp", 1), ("lightning", "fsdp2", 1), ("torchrun", "deepspeed_2", 1)]


@pytest.mark.parametrize(("launcher", "strategy", "victim", "moment"), KILLED)
def test_a_killed_rank_ends_the_run_which_says_so(tmp_path, launcher, strategy, victim, moment):
    with world(tmp_path, launcher, strategy=strategy, moment=moment, victim=victim) as started:
        processes = list(map(int, started.wait_for("at_moment.0", "at_moment.1")))
        os.kill(processes[victim], signal.SIGKILL)
        status = started.end_within(LIMIT_SECONDS)
        assert status != 0
        named = rf"error: rank {victim} \(host .*, process {processes[victim]}\) has died; rank {1 - victim} ends too"
        assert re.search(named, started.printed), started.printed[-3000:]


@pytest.mark.parametrize(("launcher", "strategy", "victim"), RAISED)
def test_an_exception_of_one_rank_ends_the_run_which_shows_it(tmp_path, launcher, strategy, victim):
    with world(tmp_path, launcher, strategy=strategy, moment="error", victim=victim) as started:
        status = started.end_within(LIMIT_SECONDS + 180)
        assert status != 0
        assert "OSError: the disk of this rank is full" in started.printed
        named = rf"rank {victim} \(host .*\) failed with OSError: the disk of this rank is full; rank {1 - victim} ends"
        assert re.search(named, started.printed), started.printed[-3000:]


@pytest.mark.parametrize("strategy", ["fsdp2", "deepspeed_2", "deepspeed_3"])
def test_a_rank_that_hangs_is_given_up(tmp_path, strategy):
    """In an update, in which the first rank waits for the gradients of the second."""
    at = {"moment": "update", "victim": 1, "of_strategy": {"timeout_seconds": TIMEOUT_SECONDS}}
    with world(tmp_path, strategy=strategy, **at) as started:
        started.wait_for("at_moment.0", "at_moment.1")
        assert started.end_within(TIMEOUT_SECONDS + LIMIT_SECONDS) != 0
        said = f"another rank hangs: .* trainer.strategy.timeout_seconds = {TIMEOUT_SECONDS}"
        assert re.search(f"error: {said}", started.printed), started.printed[-3000:]
        named = rf"error: rank 0 \(host .*\) failed with TimeoutError: {said}.*; rank 1 ends too"
        assert re.search(named, started.printed), started.printed[-3000:]


def test_a_rank_that_does_nothing_for_long_is_not_taken_for_dead(tmp_path):
    """Not even its threads run: a reward that holds the interpreter is no worse."""
    with world(tmp_path, strategy="ddp", moment="generate", iterations=3) as started:
        _, process = map(int, started.wait_for("at_moment.0", "at_moment.1"))
        os.kill(process, signal.SIGSTOP)
        time.sleep(SILENT_SECONDS + SLOW_SECONDS)
        os.kill(process, signal.SIGCONT)
        (tmp_path / "go_on").touch()
        assert started.end_within(2 * LIMIT_SECONDS) == 0, started.printed[-3000:]
        assert "error" not in started.printed

"""Worlds of ranks: processes that call one function together, with gloo between them.

A rank is forked off a server that has imported everything, and makes as many runs as it is given: a world of two costs
a few seconds, where one that Lightning launches costs twenty. The ranks come as torchrun's do: Lightning finds their
numbers in the environment, and launches nothing.
"""

import multiprocessing
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch

WATCHDOG_SECONDS = 120
PRELOADED = ["replay", "deepspeed"]


def launch(function: Callable[..., None], folder: Path, *arguments: Any, num_ranks: int) -> None:
    """Call a function of this or another module on every rank, and wait for all.

    Args:
        function: Called as `function(folder, *arguments)`; it writes files to the folder as it gets on.
        folder: Made where there is none. What a rank prints goes to `log.0`, `log.1`, ...
        arguments: What can be pickled.
        num_ranks: How many ranks there are.

    Raises:
        AssertionError: A rank fails, or no file is written for `WATCHDOG_SECONDS`; with what the ranks printed.
    """
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "NODE_RANK": "0"}
    ranks = [
        _server().Process(target=_rank, args=(rank, environment, function, folder, *arguments))
        for rank in range(num_ranks)
    ]
    for rank in ranks:
        rank.start()
    try:
        is_alive = _watch(ranks, folder)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    codes = [rank.exitcode for rank in ranks]
    printed = "\n".join(f"{file.name}: {file.read_text()[-3000:]}" for file in sorted(folder.glob("log.*")))
    assert is_alive, f"nothing came for {WATCHDOG_SECONDS} s\n{printed}"
    assert not any(codes), f"exit codes {codes}\n{printed}"


def _watch(ranks: list[Any], folder: Path) -> bool:
    """Until all ranks are done or one fails. Returns whether they got on."""
    newest, since = 0.0, time.monotonic()
    while all(not rank.exitcode for rank in ranks):
        running = [rank.sentinel for rank in ranks if rank.exitcode is None]
        if not running:
            return True
        wait(running, timeout=1)
        if (found := max((file.stat().st_mtime for file in folder.iterdir()), default=0.0)) > newest:
            newest, since = found, time.monotonic()
        if time.monotonic() - since > WATCHDOG_SECONDS:
            return False
    return True


@cache
def _server() -> ForkServerContext:
    """What ranks are forked off, once it runs: by then, DeepSpeed knows that there are CPUs alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    here = {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    before = {name: os.environ.get(name) for name in here}
    here["PYTHONPATH"] += os.pathsep + os.environ.get("PYTHONPATH", "")
    os.environ.update(here)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def _rank(rank: int, environment: dict[str, str], function: Callable[..., None], folder: Path, *arguments: Any) -> None:
    threading.Thread(target=_end_with_the_tests, daemon=True).start()
    log = os.open(folder / f"log.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(environment, LOCAL_RANK=str(rank))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    function(folder, *arguments)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the first rank holds what the others find each other by


def _end_with_the_tests() -> None:
    """A rank outlives nobody who waits for it."""
    tests = multiprocessing.parent_process()
    assert tests is not None, "a rank is started by another process"
    tests.join()
    os._exit(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

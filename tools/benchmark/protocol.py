"""What the coordinator and its workers say to each other.

A worker is a process in the environment of one framework, in the middle of its own training loop: it waits where a step
would begin. Only the worker that has been told to do something computes.
"""

import os
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tools.benchmark import memory


@dataclass(frozen=True, kw_only=True)
class Hello:
    """What a worker says when it is ready."""

    framework: str
    """Name and version."""
    base_bytes: int
    """Memory before the model was loaded."""
    num_parameters: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a worker says of a step, or of a rollout alone."""

    seconds: float
    peak_bytes: int
    lengths: tuple[int, ...]
    """The tokens of each completion."""
    seconds_by_phase: Mapping[str, float] = field(default_factory=dict)


class FinishedError(Exception):
    """Leaves the framework's training loop: the coordinator wants no more."""


class Channel:
    """The worker's end.

    Args:
        descriptor: Of the pipe, which the coordinator has handed down.
    """

    def __init__(self, descriptor: int) -> None:
        self._connection = Connection(descriptor)
        self.handlers: dict[str, Callable[[Any], Any]] = {}
        """What to answer a command but ``step`` with, by its name; they get its argument."""

    def say(self, message: Any) -> None:
        """Answer."""
        self._connection.send(message)

    def wait_for_step(self) -> Any:
        """Answer commands until the next step is wanted, and return its argument.

        Raises:
            FinishedError: No further step is wanted.
        """
        while True:
            command, argument = self._connection.recv()
            if command == "finish":
                raise FinishedError
            if command == "step":
                memory.reset_peak()
                return argument
            self.say(self.handlers[command](argument))


class Worker:
    """The coordinator's end: a process of one framework.

    Args:
        module: To run, ``tools.benchmark.ours``.
        python: The interpreter of the framework's environment.
        arguments: Of the module, after the descriptor of the pipe.
        num_threads: On which it computes.
    """

    def __init__(self, module: str, *, python: str, arguments: list[str], num_threads: int) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "OMP_NUM_THREADS": str(num_threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TQDM_DISABLE": "1",
            "PYTHONWARNINGS": "ignore",
        }
        self._connection, theirs = Pipe()
        with theirs:
            descriptor = theirs.fileno()
            command = [python, "-m", module, str(descriptor), *arguments]
            self._process = subprocess.Popen(command, env=environment, pass_fds=[descriptor])

    def wait_until_ready(self) -> Hello:
        """What it says then; to be called once, before anything is asked."""
        return self._answer()

    def ask(self, command: str, argument: Any = None) -> Any:
        """Have something done, and wait for the answer.

        Raises:
            RuntimeError: The worker has ended; its traceback is on the standard error output.
        """
        self._connection.send((command, argument))
        return self._answer()

    def close(self) -> None:
        """End the process; one that does not end by itself is killed."""
        with suppress(BrokenPipeError):
            self._connection.send(("finish", None))
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _answer(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError as error:
            raise RuntimeError(f"The worker {self._process.args} has ended.") from error

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

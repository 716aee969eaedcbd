"""Functions run in processes of their own, each call with a deadline.

A call that never returns is stopped by killing its process. That works where an alarm signal does not: off the main
thread, and inside C code that holds the interpreter. A call that takes its process down (`os._exit`, a segmentation
fault, memory) ends that call alone. Workers are fresh interpreters, not forks, so they hold no weights and no CUDA
context.

This is no sandbox: the function runs with the user's rights.
"""

import contextlib
import enum
import inspect
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from grpo_lightning.rewards import worker as worker_program
from grpo_lightning.types import ConfigurationError

START_SECONDS = 300.0
"""How long a worker may take to import its function."""


class CallStatus(enum.Enum):
    """How a call ended."""

    RETURNED = "returned"
    RAISED = "raised"
    TIMED_OUT = "timed out"
    CRASHED = "crashed"
    """The process died under the call."""


class CallResult(NamedTuple):
    """The outcome of one call.

    Example: ``CallResult(CallStatus.TIMED_OUT, None, "No result within 2 s.")``
    """

    status: CallStatus
    value: Any
    """What the function returned; None unless it returned."""
    error: str | None
    """The traceback, or what happened to the process; None if the function returned."""


class FunctionSource(NamedTuple):
    """Where a worker finds a function: by its module's name or, where that does not import, in a file.

    Example: ``FunctionSource("my_rewards", "/home/me/my_rewards.py", "brevity")``
    """

    module: str
    file: str | None
    qualname: str


Call = tuple[tuple[Any, ...], Mapping[str, Any]]
"""The positional and the keyword arguments of one call."""


def locate(function: Callable[..., Any]) -> FunctionSource:
    """Where a worker finds `function`.

    Raises:
        ConfigurationError: It has no importable name: a lambda, a function inside a function, a `partial`, an object.
    """
    module = getattr(function, "__module__", None)
    qualname = getattr(function, "__qualname__", "<object>")
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    is_bound = inspect.ismethod(function) and not isinstance(function.__self__, type)
    if module is None or "<" in qualname or is_bound or (module == "__main__" and file is None):
        raise ConfigurationError(
            f"With `isolate`, a reward function must stand at the top level of a file, got {function!r}."
        )
    return FunctionSource(module, file, qualname)


class WorkerPool:
    """A few processes that run one function.

    The processes start when first needed and stay for later calls, until `close` or the end of the program.

    Args:
        source: The function.
        timeout_seconds: Deadline of each call, counted from when a free process takes it; None for none.
        num_workers: How many calls run at a time, >= 1.
    """

    def __init__(self, source: FunctionSource, *, timeout_seconds: float | None, num_workers: int) -> None:
        if timeout_seconds is not None and not timeout_seconds > 0:
            raise ConfigurationError(f"A reward's `timeout_seconds` must be > 0 or null, got {timeout_seconds}.")
        if num_workers < 1:
            raise ConfigurationError(f"A reward's `num_workers` must be >= 1, got {num_workers}.")
        self.num_workers = num_workers
        self._workers = [_Worker(source, timeout_seconds) for _ in range(num_workers)]
        self._finalizer = weakref.finalize(self, _close_all, self._workers)  # also when the program ends

    def map(self, calls: Sequence[Call]) -> list[CallResult]:
        """Make every call and give the results in order. No call's outcome touches another's.

        Raises:
            ConfigurationError: The function cannot be imported in a worker.
        """
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            idle.put(worker)

        def run(call: Call) -> CallResult:
            worker = idle.get()
            try:
                return worker.call(call)
            finally:
                idle.put(worker)

        # Threads only wait for processes here. As many as processes, so that `idle` always has one for each.
        executor = ThreadPoolExecutor(min(self.num_workers, max(1, len(calls))))
        try:
            return list(executor.map(run, calls))
        except BaseException:  # an interrupt must not wait for calls that may never return
            executor.shutdown(wait=False, cancel_futures=True)
            self.close()
            raise
        finally:
            executor.shutdown()

    def close(self) -> None:
        """End the processes. Later calls start new ones."""
        _close_all(self._workers)


class _Worker:
    """One process, started again after each that had to be killed."""

    def __init__(self, source: FunctionSource, timeout_seconds: float | None) -> None:
        self._source = source
        self._timeout_seconds = timeout_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._has_started = False

    def call(self, call: Call) -> CallResult:
        """Run one call, at most until the deadline."""
        try:
            payload = pickle.dumps(call)
        except Exception as error:
            return CallResult(CallStatus.RAISED, None, f"The arguments cannot be sent to a worker: {error!r}")
        for _ in range(2):
            if self._process is None or self._process.poll() is not None:
                failure = self._start()
                if failure is not None:
                    return failure
            result = self._exchange(payload, self._timeout_seconds)
            if result is not None:
                return result
        return CallResult(CallStatus.CRASHED, None, "Two worker processes died before they took the call.")

    def close(self) -> None:
        """Kill the process and what it started, and collect it."""
        process, self._process = self._process, None
        if process is None:
            return
        _kill(process)
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # closing flushes what the dead process did not read
                    stream.close()

    def _start(self) -> CallResult | None:
        """Start a process and wait until it has its function; what went wrong if a replacement does not start."""
        self.close()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-P", worker_program.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is the parent's; and what the function starts is killed with it
            )
        except OSError as error:
            result = CallResult(CallStatus.CRASHED, None, str(error))
        else:
            result = self._exchange(pickle.dumps((list(sys.path), *self._source)), START_SECONDS) or CallResult(
                CallStatus.CRASHED, None, "It ended at once."
            )
        if result.status is CallStatus.RETURNED:
            self._has_started = True
            return None
        self.close()
        if self._has_started:
            return CallResult(CallStatus.CRASHED, None, f"A new worker did not start. {result.error}")
        reason = (result.error or "").strip().splitlines()[-1]
        raise ConfigurationError(
            f"A worker process cannot load the reward function {self._source.module}.{self._source.qualname}:\n{reason}"
        )

    def _exchange(self, payload: bytes, timeout_seconds: float | None) -> CallResult | None:
        """Send `payload` and wait for the reply; at the deadline the process is killed, which ends the wait.

        Returns:
            The outcome; None if the process was gone before it took the payload, which is then not to blame.
        """
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        is_taken, reply = False, None
        # EOFError and OSError: it died. ValueError: another thread closed the streams.
        death = contextlib.suppress(EOFError, OSError, ValueError, pickle.UnpicklingError)
        with _deadline(process, timeout_seconds) as is_over, death:
            pickle.dump(payload, process.stdin)
            process.stdin.flush()
            is_taken = pickle.load(process.stdout) == worker_program.TAKEN
            reply = pickle.load(process.stdout)
        if reply is not None:
            return _read_reply(reply)
        self.close()
        process.wait()  # `close` may have been another thread's
        if is_over.is_set():
            return CallResult(CallStatus.TIMED_OUT, None, f"No result within {timeout_seconds:g} s.")
        if not is_taken:
            return None
        return CallResult(CallStatus.CRASHED, None, f"The worker process {_describe_end(process.returncode)}.")


@contextlib.contextmanager
def _deadline(process: "subprocess.Popen[bytes]", seconds: float | None) -> Iterator[threading.Event]:
    """Kill `process` unless the block ends within `seconds`; yields the event that is set when that happens."""
    is_over = threading.Event()
    if seconds is None:
        yield is_over
        return

    def end() -> None:
        is_over.set()
        _kill(process)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield is_over
    finally:
        timer.cancel()
        timer.join()  # a kill under way must not meet the next call


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and all that it started."""
    with contextlib.suppress(OSError):  # it is gone already
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _read_reply(reply: bytes) -> CallResult:
    try:
        status, value = pickle.loads(reply)
    except Exception as error:
        return CallResult(CallStatus.RAISED, None, f"The result cannot be read outside its worker: {error!r}")
    if status == worker_program.RAISED:
        return CallResult(CallStatus.RAISED, None, value)
    return CallResult(CallStatus.RETURNED, value, None)


def _describe_end(returncode: int) -> str:
    if returncode < 0:
        return f"was ended by {signal.Signals(-returncode).name} during the call"
    return f"ended with exit code {returncode} during the call"


def _close_all(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.close()

"""A run that is asked to stop: all ranks stop at the same moment, one whose state is worth saving.

A signal comes at any time, and to some ranks alone. It is noted, and acted upon where all ranks come by: before each
micro-batch, and where completions have been drawn or scored. Drawing and scoring, which can take long and change
nothing that is saved, are broken off.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

SAME_PRESS_SECONDS = 1.0
"""Ctrl-C reaches a rank itself, and by what other ranks tell it: within this time that is one press."""
T = TypeVar("T")


class StoppedRun(SIGTERMException):
    """The run was asked to stop; as a `SystemExit` it ends the process with 128 + the signal's number.

    Args:
        signum: Of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


class _BrokenOffError(BaseException):
    """Leaves work that a stopped run does not need. Not an `Exception`, lest a reward takes it for its own failure."""


class Stopping:
    """Whether the run is to stop, and where it may.

    The callback `EndTogether` hands signals to it, and news of those that other ranks got.
    """

    def __init__(self) -> None:
        self.signum = 0
        """Of the signal that the run was asked to stop with; 0 for none."""
        self.device: torch.device | None = None
        """One that all ranks can reduce on; None where there is one rank alone."""
        self.tell_others: Callable[[int], None] | None = None
        self._asked_at = 0.0
        self._can_break_off = False
        self._main_thread: int | None = None
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, object]) -> "Stopping":
        """Itself: a copy of a module, such as the average of its weights, belongs to the same run."""
        return self

    def begin(self, device: torch.device | None, tell_others: Callable[[int], None]) -> None:
        """Signals may come from here on, in this thread."""
        self.signum = 0
        self.device, self.tell_others = device, tell_others
        self._main_thread = threading.get_ident()

    def end(self) -> None:
        """No signal is for us any more."""
        with self._lock:
            self._main_thread = None

    def on_signal(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002 - Python's signature
        """Handle a signal, in the main thread.

        Raises:
            KeyboardInterrupt: At the second Ctrl-C: whoever presses it again does not want to wait.
        """
        if self.signum == signum == signal.SIGINT and time.monotonic() - self._asked_at > SAME_PRESS_SECONDS:
            raise KeyboardInterrupt
        if not self.signum:
            self._note(signum)
            name = signal.Signals(signum).name
            os.write(2, f"{name}: the run saves its state and stops.\n".encode())  # printing could be under way
            if self.tell_others is not None:
                self.tell_others(signum)
        if self._can_break_off:
            self._can_break_off = False
            raise _BrokenOffError

    def on_news(self, signum: int) -> None:
        """Another rank was asked to stop. Not in the main thread, which may be asleep: it is sent the signal too."""
        with self._lock:
            if self._main_thread is not None and not self.signum:
                self._note(signum)
                signal.pthread_kill(self._main_thread, signum)

    def _note(self, signum: int) -> None:
        self._asked_at, self.signum = time.monotonic(), signum

    def unless_stopped(self, work: Callable[[], T], *, can_break_off: bool) -> T:
        """Do what takes long. All ranks leave it together: a collective.

        Args:
            work: What it has not finished is worth nothing.
            can_break_off: Whether one rank can leave it while others are in it: it exchanges nothing between ranks.

        Raises:
            StoppedRun: See `check`.
        """
        is_alone = can_break_off or self.device is None
        result = None
        try:
            try:
                self._can_break_off = is_alone
                if not (self.signum and is_alone):
                    result = work()
            finally:
                self._can_break_off = False
        except _BrokenOffError:
            pass
        self.check()
        return result  # type: ignore[return-value]  # there is one, or `check` has raised

    def check(self) -> None:
        """Where all ranks come by. A collective.

        Raises:
            StoppedRun: On all ranks: one of them was asked to stop.
        """
        signum = self.signum
        if self.device is not None:
            asked = torch.tensor([signum], device=self.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            signum = int(asked)
        if signum:
            raise StoppedRun(signum)

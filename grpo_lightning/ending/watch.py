"""Every rank learns at once that another has died, has failed or was asked to stop.

All ranks are connected to the first one, which passes on what it hears. A thread waits for news; it holds no lock and
takes no time while there are none.
"""

import queue
import selectors
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from grpo_lightning.ending.link import SILENT_SECONDS, Link, Member, Message

SETTLE_SECONDS = 1.0
"""How long a rank that fails waits before it says so: its reason may be that another has died."""


class Watch(threading.Thread):
    """This rank's part.

    Args:
        me: This rank.
        link: To the first rank; None on the first rank, to which they come through `server`.
        on_death: Told, in this thread, which rank has died.
        on_failure: Told which rank raised what.
        on_stop: Told the number of the signal that another rank was asked to stop with.
        server: The first rank's, see `listen`.
        token: That the other ranks must know.
    """

    def __init__(
        self,
        me: Member,
        link: Link | None,
        *,
        on_death: Callable[[str], None],
        on_failure: Callable[[str], None],
        on_stop: Callable[[int], None],
        server: socket.socket | None = None,
        token: str = "",
    ) -> None:
        super().__init__(name="rank-watch", daemon=True)
        self.me, self.links = me, [] if link is None else [link]
        self.on_death, self.on_failure, self.on_stop = on_death, on_failure, on_stop
        self._server, self._token = server, token
        self._is_leaving = False
        self._has_told = threading.Event()
        self._orders: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._bell, self._button = socket.socketpair()
        self._button.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._bell, selectors.EVENT_READ, self._take_orders)
        if server is not None:
            self._selector.register(server, selectors.EVENT_READ, self._accept)
        if link is not None:
            self._add(link)

    # What the main thread asks for

    def tell_stop(self, signum: int) -> None:
        """Tell the others that the run is to stop. It may be called in a signal handler."""
        self._order({"stop": signum})

    def tell_failure(self, error: BaseException) -> None:
        """Tell the others what this rank raised, and return when they know."""
        lines = str(error).strip().splitlines() or [""]
        self._order({"failed": f"{self.me} failed with {type(error).__name__}: {lines[0][:500]}"})
        self._has_told.wait(timeout=2 * SETTLE_SECONDS + 1)

    def leave(self) -> None:
        """The run has ended well for this rank. The first rank waits until it has for all."""
        self._order({"left": True})
        self.join()

    def _order(self, message: Message) -> None:
        self._orders.put(message)
        with suppress(OSError):  # the bell has been rung already, or nobody is there any more
            self._button.send(b"\0")

    # The thread

    def run(self) -> None:
        """Wait for news until this rank leaves."""
        while not self._has_ended:
            for key, _ in self._selector.select():
                key.data()
        for connection in (self._server, self._bell, self._button, *(link.connection for link in self.links)):
            if connection is not None:
                connection.close()
        self._selector.close()

    @property
    def _has_ended(self) -> bool:
        """For the first rank: when it has for all, whose connections end here."""
        is_first = self._server is not None
        return self._is_leaving and not (is_first and any(link.member and not link.has_left for link in self.links))

    def _take_orders(self) -> None:
        self._bell.recv(64)
        while not self._orders.empty():
            order = self._orders.get()
            if "failed" in order:
                self._settle()
            self._pass_on(order)
            if "failed" in order:
                self._has_told.set()
            elif "left" in order:
                self._is_leaving = True

    def _settle(self) -> None:
        """Hear of a death that is the reason for this rank's failure before telling anybody of the latter."""
        for key, _ in self._selector.select(timeout=SETTLE_SECONDS):
            if key.data != self._take_orders:
                key.data()

    def _accept(self) -> None:
        assert self._server is not None
        link = Link(self._server.accept()[0])
        self.links.append(link)
        self._add(link)

    def _add(self, link: Link) -> None:
        self._selector.register(link.connection, selectors.EVENT_READ, partial(self._read, link))

    def _read(self, link: Link) -> None:
        try:
            for message in link.receive():
                self._hear(link, message)
        except (EOFError, OSError, ValueError) as error:  # the last: a stranger at the door
            self._selector.unregister(link.connection)
            if link.member is not None and not link.has_left:
                what = "has died" if isinstance(error, EOFError) else f"has not been heard of for {SILENT_SECONDS} s"
                self._hear(link, {"died": f"{link.member} {what}"})
            link.has_left = True

    def _hear(self, link: Link, message: Message) -> None:
        if "hello" in message and message["token"] == self._token:
            link.member = Member(*message["hello"])
        if link.member is None:
            return
        if self._server is not None and "hello" not in message:
            self._pass_on(message, but=link)
        if "left" in message or "failed" in message:
            link.has_left = True
        if "stop" in message:
            self.on_stop(message["stop"])
        elif "failed" in message:
            self.on_failure(message["failed"])
        elif "died" in message:
            self.on_death(message["died"])

    def _pass_on(self, message: Message, but: Link | None = None) -> None:
        """To all others, through the first rank; that somebody has left concerns the first rank alone."""
        if "left" in message and self._server is not None:
            return
        for link in self.links:
            if link is not but and not link.has_left:
                link.send(message)

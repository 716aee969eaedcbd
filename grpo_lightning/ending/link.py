"""A connection between two ranks, on which each notices that the other is gone.

The operating system closes the connections of a process that dies, and asks a silent machine whether it is still there:
neither needs the other's interpreter, so a rank that is busy for hours is as good as any.
"""

import json
import secrets
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

SILENT_SECONDS = 30
"""How long a machine may leave the operating system's questions unanswered."""
CONNECT_SECONDS = 20.0
_NUM_QUESTIONS = 4

Message = dict[str, Any]


class Member(NamedTuple):
    """One process of a run.

    Example: ``Member(rank=1, host="node7", pid=4711)``
    """

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.pid})"


class Address(NamedTuple):
    """Where the first rank is reached, and the word that its ranks know each other by."""

    host: str
    port: int
    token: str
    first: Member


class Link:
    """One rank's end of a connection to another.

    Args:
        connection: To the other.
        member: The other; None until it has said so.
    """

    def __init__(self, connection: socket.socket, member: Member | None = None) -> None:
        ask_when_silent(connection)
        self.connection, self.member = connection, member
        self.has_left = False
        """Whether the other has said that it goes: its silence is none of our business any more."""
        self._rest = b""

    def send(self, message: Message) -> None:
        """Say something, or nothing where nobody listens: that is noticed by who reads."""
        with suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> Iterator[Message]:
        """What has come in.

        Raises:
            EOFError: The other's process has ended.
            OSError: The other's machine does not answer.
        """
        try:
            data = self.connection.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            raise EOFError
        *lines, self._rest = (self._rest + data).split(b"\n")
        yield from map(json.loads, lines)


def listen(host: str | None, first: Member) -> tuple[socket.socket, Address]:
    """Wait for the other ranks at a free port.

    Args:
        host: Where they reach this machine; None where all of them are on it.
        first: This rank.
    """
    server = socket.create_server(("127.0.0.1" if host is None else "", 0))
    return server, Address(host or "127.0.0.1", server.getsockname()[1], secrets.token_hex(8), first)


def connect(address: Address, member: Member) -> Link:
    """Present oneself to the first rank.

    Raises:
        OSError: It cannot be reached.
    """
    connection = socket.create_connection(address[:2], timeout=CONNECT_SECONDS)
    connection.settimeout(None)
    link = Link(connection, address.first)
    link.send({"hello": member, "token": address.token})
    return link


def ask_when_silent(connection: socket.socket) -> None:
    """Have the operating system find out within `SILENT_SECONDS` that the other machine is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    every = SILENT_SECONDS // (_NUM_QUESTIONS + 2)
    settings = {
        "TCP_KEEPIDLE": 2 * every,
        "TCP_KEEPINTVL": every,
        "TCP_KEEPCNT": _NUM_QUESTIONS,
        "TCP_USER_TIMEOUT": 1000 * SILENT_SECONDS,  # of what was sent and not acknowledged
    }
    for name, value in settings.items():
        if hasattr(socket, name):  # they differ between operating systems
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

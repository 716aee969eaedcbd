"""Processes of which the first sends tensors to the others, in a group of their own beside torch's default one."""

import os
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

_c10d: Any = distributed
"""With what its stubs leave out."""
_POLL_SECONDS = 1e-4


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Where a group comes together, in words that JSON knows.

    Args:
        name: That no other group has.
        address: Of the first process, as the others reach it.
        port: On which it waits for them.
        size: How many they are.
        backend: "nccl" between GPUs, else "gloo".
        seconds: Longest wait for the others, here and at every tensor.
    """

    name: str
    address: str
    port: int
    size: int
    backend: str
    seconds: float


class TransferGroup:
    """One process's place in a group.

    Making one is a collective. A group in which anything went wrong is of no more use: make another one.

    Args:
        meeting: Where it comes together.
        rank: Of this process; the first sends.
        device: Where this process has the tensors.
        store: That of the first process, which waits for the others.

    Raises:
        RuntimeError: The others were not there in time.
    """

    def __init__(self, meeting: Meeting, *, rank: int, device: torch.device, store: Any = None) -> None:
        if meeting.backend == "nccl" and device.type != "cuda":
            raise RuntimeError(f"the sender has its weights on a GPU, and worker {rank} has its own on {device}")
        self.name, self._seconds = meeting.name, meeting.seconds
        self._device = device if meeting.backend == "nccl" else torch.device("cpu")
        wait = timedelta(seconds=meeting.seconds)
        store = store or _c10d.TCPStore(meeting.address, meeting.port, wait_for_workers=False, timeout=wait)
        self._group = _backend(meeting, rank, store, wait)
        self.broadcast(torch.zeros(1, device=self._device))  # NCCL connects at the first one

    def receive(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        """The next tensor that the first process broadcasts."""
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        self.broadcast(tensor)
        return tensor

    def broadcast_all(self, tensors: Iterable[Tensor]) -> None:
        """Send tensors, one after the other."""
        for tensor in tensors:
            self.broadcast(tensor)

    def broadcast(self, tensor: Tensor) -> None:
        """Send a tensor, or as another process than the first write into it, bit by bit. A collective.

        Raises:
            RuntimeError: Another process is gone, or was not there in time.
        """
        bits_N = tensor.to(self._device).reshape(-1).view(torch.uint8)
        options = distributed.BroadcastOptions()
        options.rootRank = 0
        work = self._group.broadcast([bits_N], options)
        deadline = time.monotonic() + self._seconds
        while not work.is_completed():
            if time.monotonic() > deadline:
                self.abort()
                raise RuntimeError(f"a tensor was not broadcast within {self._seconds:g} s")
            time.sleep(_POLL_SECONDS)
        work.wait()

    def abort(self) -> None:
        """Give up what is under way."""
        self._group.abort()


def waiting_store(address: str, *, seconds: float) -> Any:
    """What the first process of a group waits for the others with, on a port of its own."""
    wait = timedelta(seconds=seconds)
    return _c10d.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=wait)


def _backend(meeting: Meeting, rank: int, store: Any, wait: timedelta) -> Any:
    store = _c10d.PrefixStore(meeting.name, store)
    if meeting.backend == "nccl":
        nccl = _c10d.ProcessGroupNCCL.Options()
        nccl._timeout = 2 * wait  # past the deadline of `broadcast`: torch ends a process whose NCCL is late
        return _c10d.ProcessGroupNCCL(store, rank, meeting.size, nccl)
    gloo = _c10d.ProcessGroupGloo._Options()
    gloo._timeout = wait
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    where = {"interface": interface} if interface else {"hostname": _own_address(meeting, rank)}
    gloo._devices = [_c10d.ProcessGroupGloo.create_device(**where)]
    return _c10d.ProcessGroupGloo(store, rank, meeting.size, gloo)


def _own_address(meeting: Meeting, rank: int) -> str:
    """Of this process, as the others reach it."""
    return address_towards(meeting.address, meeting.port, seconds=meeting.seconds) if rank else meeting.address


def address_towards(host: str, port: int, *, seconds: float) -> str:
    """That of this machine from which it reaches another one, which listens on a port."""
    with socket.create_connection((host, port), seconds) as line:
        return str(line.getsockname()[0])

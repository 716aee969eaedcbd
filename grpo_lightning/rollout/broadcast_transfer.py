"""Weights that go to servers over the network, without files."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from functools import partial
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import torch
from torch import Tensor

from grpo_lightning.rollout.background import in_background
from grpo_lightning.rollout.server import Server, ServerError
from grpo_lightning.rollout.transfer_group import Meeting, TransferGroup, address_towards, waiting_store
from grpo_lightning.rollout.weight_transfer import WeightTransfer, parts

_PART_BYTES = 1 << 26
"""Of tensors that are announced to the servers by one request; in between they can give signs of life."""


class BroadcastTransfer(WeightTransfer):
    """Broadcasts each tensor to all workers of all servers, through NCCL between GPUs, else through gloo.

    The first rank and the workers are a group of their own. It is made when weights are sent and a server is not in it,
    because nobody was yet, or because the server was started again; and anew after every fault.

    Args:
        device: Where the policy is.
        seconds: Longest wait for the servers, when they join and at every part of the weights.
    """

    def __init__(self, device: torch.device, *, seconds: float) -> None:
        self._device, self._seconds = device, seconds
        self._group: TransferGroup | None = None

    def send(self, servers: Sequence[Server], named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See the base class."""
        group = self._joined_by(servers)
        for part in parts(named_tensors, num_bytes=_PART_BYTES):
            described = [
                [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in part.items()
            ]
            self._together(
                [(server, "receive_broadcast", (described, version)) for server in servers],
                partial(group.broadcast_all, list(part.values())),
            )

    def _joined_by(self, servers: Sequence[Server]) -> TransferGroup:
        """The group that the servers' workers are in; a new one where one of them is not."""
        groups = [server.ask_workers("report_transfer_group", timeout=self._seconds) for server in servers]
        if self._group is None or any(name != self._group.name for names in groups for name in names):
            self._group = self._new_group(servers, [len(names) for names in groups])
        return self._group

    def _new_group(self, servers: Sequence[Server], num_workers: Sequence[int]) -> TransferGroup:
        address = _address_of_trainer(servers, self._seconds)
        store = waiting_store(address, seconds=self._seconds)
        meeting = Meeting(
            name=uuid4().hex,
            address=address,
            port=store.port,
            size=1 + sum(num_workers),
            backend="nccl" if self._device.type == "cuda" else "gloo",
            seconds=self._seconds,
        )
        before = [1 + sum(num_workers[:i]) for i in range(len(servers))]
        groups: list[TransferGroup] = []
        self._together(
            [(s, "join_transfer_group", (vars(meeting), first)) for s, first in zip(servers, before, strict=True)],
            lambda: groups.append(TransferGroup(meeting, rank=0, device=self._device, store=store)),
        )
        return groups[0]

    def _together(
        self, asked: Sequence[tuple[Server, str, tuple[object, ...]]], own_part: Callable[[], object]
    ) -> None:
        """Ask the servers' workers for their part in a collective, and do one's own.

        Raises:
            ServerError: One of them failed, or not all were done in time. The group is given up.
        """
        parts_of_all: list[Future[Any]] = [
            in_background(server.ask_workers, method, *arguments, timeout=self._seconds)
            for server, method, arguments in asked
        ]
        parts_of_all.append(in_background(own_part))
        done, pending = wait(parts_of_all, timeout=2 * self._seconds, return_when=FIRST_EXCEPTION)
        faults: list[BaseException] = [fault for fault in (part.exception() for part in done) if fault is not None]
        if not faults and not pending:
            return
        if self._group is not None:
            self._group.abort()
            self._group = None
        faults.append(RuntimeError(f"not done within {2 * self._seconds:g} s"))
        fault = min(faults, key=lambda fault: isinstance(fault, RuntimeError))  # what a server says tells more
        if isinstance(fault, RuntimeError):  # of torch's groups
            raise ServerError(f"model.engine.transfer: weights could not be broadcast: {fault}") from fault
        raise fault


def _address_of_trainer(servers: Sequence[Server], seconds: float) -> str:
    """Under which all servers reach this process."""
    urls = [urlsplit(server.url) for server in servers]
    try:
        addresses = [
            address_towards(str(url.hostname), url.port or {"http": 80}.get(url.scheme, 443), seconds=seconds)
            for url in urls
        ]
    except OSError as error:
        raise ServerError(f"model.engine.urls: a server cannot be reached: {error}") from error
    return next((address for address in addresses if not ip_address(address).is_loopback), addresses[0])

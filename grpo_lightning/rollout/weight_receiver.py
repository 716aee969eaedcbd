"""What runs inside a vLLM worker: takes over tensors one by one, and says which it holds.

vLLM keeps several of a checkpoint's tensors in one parameter, or a part of one on each worker. So the copies that its
loader makes are watched: for each tensor that arrived, where its elements went, and what their checksum was.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_lightning.functional.checksums import checksum
from grpo_lightning.rollout.transfer_group import Meeting, TransferGroup

RECEIVER = "grpo_lightning.rollout.weight_receiver.WeightReceiver"
"""The value of vLLM's ``worker_extension_cls``."""


class Write(NamedTuple):
    """Elements that a tensor brought into a parameter."""

    destination: Tensor
    """A view of the parameter."""
    checksum: int
    """Of what was written."""


@dataclass
class Held:
    """A tensor as it arrived."""

    version: int
    checksum: int
    writes: list[Write] = field(default_factory=list)

    @property
    def report(self) -> list[int | None]:
        """Its version and its checksum; None for a checksum where what it brought is not there any more."""
        is_there = self.writes and all(checksum(write.destination) == write.checksum for write in self.writes)
        return [self.version, self.checksum if is_there else None]


class _Watch(TorchDispatchMode):
    """Notes the copies that are made while `arriving` is being loaded, of which `tensor` is kept."""

    tensor: Held | None = None
    arriving: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default and self.tensor is not None:
            destination, source = args[:2]
            self.tensor.writes.append(Write(destination, self._checksum(source.to(destination.dtype))))
        return result

    def _checksum(self, written: Tensor) -> int:
        """Known already where it is all that has arrived."""
        assert self.tensor is not None, "something is being loaded"
        if (
            self.arriving is not None
            and (written.data_ptr(), written.numel()) == (self.arriving.data_ptr(), self.arriving.numel())
            and written.is_contiguous()
            and self.arriving.is_contiguous()
        ):
            return self.tensor.checksum
        return checksum(written)


class WeightReceiver:
    """Mixed into vLLM's worker, which calls these methods by name (``collective_rpc``)."""

    held_weights: dict[str, Held] | None = None
    num_receipts = 0
    transfer_group: TransferGroup | None = None
    instance_name: str

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG004 - those of the worker
        """The one place that runs in a worker before its model is loaded."""
        _keep_weights_plain()
        worker = super().__new__(cls)
        worker.instance_name = uuid4().hex
        return worker

    def receive_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over some of the policy's tensors, under the names of its checkpoint."""
        held = self.held_weights = self.held_weights or {}
        self.num_receipts += 1
        watch = _Watch()  # type: ignore[no-untyped-call]  # of torch

        def arriving() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in named_tensors:
                watch.tensor, watch.arriving = Held(version, checksum(tensor)), tensor
                held[name] = watch.tensor
                yield name, tensor
            watch.tensor = watch.arriving = None

        model = self.model_runner.get_model()  # type: ignore[attr-defined]  # of the worker
        with torch.no_grad(), watch:
            model.load_weights(arriving())

    def receive_weights_file(self, path: str, version: int) -> None:
        """Take over the tensors of a safetensors file, one by one."""
        with safe_open(path, framework="pt") as file:
            self.receive_weights(((name, file.get_tensor(name)) for name in file.keys()), version)  # noqa: SIM118

    def join_transfer_group(self, meeting: dict[str, Any], first: int) -> None:
        """Become a member of a group that weights are broadcast in, in the place of the one before. A collective.

        Args:
            meeting: See `Meeting`.
            first: The rank in it of this server's first worker.
        """
        self.transfer_group = None
        rank, device = first + self.rank, self.device  # type: ignore[attr-defined]  # of the worker
        self.transfer_group = TransferGroup(Meeting(**meeting), rank=rank, device=device)

    def report_transfer_group(self) -> str | None:
        """The name of the group that this worker is in."""
        return None if self.transfer_group is None else self.transfer_group.name

    def receive_broadcast(self, described: list[tuple[str, str, list[int]]], version: int) -> None:
        """Take over the tensors that are broadcast next, one by one.

        Args:
            described: Name, dtype and shape of each.
            version: Of all of them.
        """
        group = self.transfer_group
        assert group is not None, "join_transfer_group comes first"
        tensors = ((name, group.receive(shape, getattr(torch, dtype))) for name, dtype, shape in described)
        try:
            self.receive_weights(tensors, version)
        except Exception:
            self.transfer_group = None  # whose members are out of step
            raise

    def keep_weights(self, names: Iterable[str], version: int) -> None:
        """Count tensors that came before as of this version; what they are is for `report_weights` to say."""
        held = self.held_weights or {}
        self.num_receipts += 1
        for name in names:
            if name in held:  # a missing one shows in the report
                held[name].version = version

    def report_instance(self) -> list[str]:
        """A name that no other start of a worker has, with how often it was sent weights."""
        return [f"{self.instance_name} after {self.num_receipts} receipts"]

    def report_weights(self) -> dict[str, Any]:
        """What this worker holds: of each tensor its version and checksum, and the parameters that none came for."""
        held = self.held_weights or {}
        written = {
            write.destination.untyped_storage().data_ptr() for tensor in held.values() for write in tensor.writes
        }
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        untouched = [n for n, p in model.named_parameters() if p.untyped_storage().data_ptr() not in written]
        return {"tensors": {name: tensor.report for name, tensor in held.items()}, "untouched": untouched}


def _keep_weights_plain() -> None:
    """Let vLLM's CPU backend multiply by the parameters themselves.

    With oneDNN it multiplies by packed copies of them: those of tied embeddings stay as they were when new weights are
    loaded, and the others' parameters are emptied, so that nothing could be verified.
    """
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _custom_ops._supports_onednn = False

"""Weights that go to servers through files."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import save_file
from torch import Tensor

from grpo_lightning.rollout.server import Server
from grpo_lightning.rollout.weight_transfer import WeightTransfer, parts

_PART_BYTES = 1 << 28


class FileTransfer(WeightTransfer):
    """Writes the tensors to a file, one part after the other, and has each server read it.

    Args:
        folder: Where the file lies, for all servers under the same path; None for the folder of temporary files.
        seconds: Longest wait for a server to read a part.
    """

    def __init__(self, folder: str | None, *, seconds: float) -> None:
        self._folder, self._seconds = folder, seconds

    def send(self, servers: Sequence[Server], named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See the base class."""
        on_cpu = ((name, tensor.cpu().contiguous()) for name, tensor in named_tensors)
        with TemporaryDirectory(prefix="grpo_lightning_", dir=self._folder) as folder:
            for part in parts(on_cpu, num_bytes=_PART_BYTES):
                path = Path(folder, "weights.safetensors")
                save_file(part, path)
                for server in servers:
                    server.ask_workers("receive_weights_file", str(path), version, timeout=self._seconds)

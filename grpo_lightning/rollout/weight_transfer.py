"""Ways on which the policy's tensors go to servers."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from grpo_lightning.rollout.server import Server


class WeightTransfer(ABC):
    """A way on which tensors go from the first rank to all workers of all servers."""

    @abstractmethod
    def send(self, servers: Sequence[Server], named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Have every worker take over every tensor, of which only a few are there at a time.

        Raises:
            ServerError: A server is lost.
        """


def parts(named_tensors: Iterable[tuple[str, Tensor]], *, num_bytes: int) -> Iterator[dict[str, Tensor]]:
    """The tensors in parts, each of which ends with the tensor that fills it."""
    part: dict[str, Tensor] = {}
    for name, tensor in named_tensors:
        part[name] = tensor
        if sum(t.nbytes for t in part.values()) >= num_bytes:
            yield part
            part = {}
    if part:
        yield part

"""Where the weights of a run lie: whole on every rank, or in shards that are put together on demand."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from grpo_lightning.strategies.emptying import put_in
from grpo_lightning.types import ConfigurationError


class Placement:
    """Whole weights on every rank: one process, DDP, and ZeRO's stages 1 and 2. Subclasses shard them.

    What needs all ranks says so; the others may be called by one rank alone.
    """

    cuts_weights: ClassVar[bool] = False
    """Whether ranks have shards of the weights: a forward of one puts them together, for which it needs the others.

    The first rank alone then loads them.
    """

    def shard(self, policy: nn.Module) -> None:
        """Give each rank its share of the weights. A collective.

        Args:
            policy: With its weights on the first rank, which lets them go; on the others they are on the meta device.
        """

    def shard_copy(self, copy: nn.Module, *, of: nn.Module) -> None:
        """Give a copy of a model the same weights, in the same shares. A collective.

        Args:
            copy: With its weights on the meta device.
            of: Of this placement.
        """
        put_in(copy, {name: weight.detach().clone() for name, weight in of.named_parameters()})

    @contextmanager
    def whole(self, policy: nn.Module) -> Iterator[None]:  # noqa: ARG002 - whole as they are
        """Inside, every weight is whole on this rank, and the ranks may call the model as often as each likes.

        Entering and leaving are collectives.
        """
        yield

    @contextmanager
    def called_together(self, policy: nn.Module) -> Iterator[Callable[[], None]]:  # noqa: ARG002 - whole as they are
        """Inside, what is around the transformer blocks is whole, and each block while it is called.

        The ranks call the language model together, each as often as the others: every call is a collective, and so are
        entering and leaving. In the place of a call, a rank may call what is yielded: it puts together what a call
        does, and computes nothing.
        """
        yield _nothing

    def itemsize(self, weight: Tensor) -> int:
        """Bytes of an element of it where it is computed with."""
        return weight.element_size()

    @classmethod
    def check_precision(cls, policy: nn.Module) -> None:
        """Training steps weights in single precision at least.

        Args:
            policy: Before it is cut, with or without weights.

        Raises:
            ConfigurationError: Some of the weights that are trained are in half precision, and there are no copies.
        """
        halves = {p.dtype for p in policy.parameters() if p.requires_grad and p.dtype.itemsize < 4}
        for dtype in halves:
            raise ConfigurationError(
                f"model.policy.dtype must be float32 where all weights are trained, got "
                f"{str(dtype).removeprefix('torch.')}: steps of usual learning rates are lost in half precision.\n"
                "Set model.lora, whose weights are in single precision, or a strategy that steps copies of the weights "
                "(deepspeed_1, deepspeed_2, deepspeed_3)."
            )

    @classmethod
    def check_compile(cls) -> None:
        """The blocks of a model may be compiled.

        Raises:
            ConfigurationError: They may not.
        """

    @classmethod
    def check_settings(cls, *, engine_has_copy: bool, max_tokens_per_microbatch: int | None) -> None:
        """The settings of a run fit.

        Args:
            engine_has_copy: Whether completions are drawn from a copy of the weights.
            max_tokens_per_microbatch: Above which a micro-batch is cut into pieces; None for never.

        Raises:
            ConfigurationError: They do not.
        """

    def weights(self, model: nn.Module, *, trained_only: bool = False) -> dict[str, Tensor]:  # noqa: ARG002
        """The whole weights of a model by name, on the first rank; others may have none. A collective.

        Args:
            model: Of this placement.
            trained_only: Whether frozen ones may be left out.
        """
        return model.state_dict()

    def shape(self, weight: Tensor) -> torch.Size:
        """Of the whole weight, also where this rank has a share alone."""
        return weight.shape

    def local(self, parameter: nn.Parameter) -> Tensor:
        """This rank's share of a weight, to be read or written in place; ranks cut all weights alike."""
        return parameter.detach()

    def pairs(self, copy: nn.Module, *, of: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of each weight of a copy, and the same elements of the model's own. A collective."""
        for mine, theirs in zip(copy.parameters(), of.parameters(), strict=True):
            yield self.local(mine), self.local(theirs)

    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """The L2 norm of the whole gradient, in fp64, the same on every rank. A collective."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        return norm_of(gradients)

    def accumulate(self, loss: Tensor) -> None:
        """Add the gradient of a loss to that of the update, before the Trainer's own backward. A collective."""
        loss.backward()

    def discard_gradients(self) -> None:
        """Forget what was accumulated for an update that is not made; the next one begins without those of weights."""


def _nothing() -> None:
    """What is whole need not be put together."""


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all elements together, in fp64."""
    norms = torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors])
    norm: Tensor = torch.linalg.vector_norm(norms)
    return norm


WHOLE = Placement()

"""Where FSDP1 has the weights: in shards, of which it puts those of a block together while it is called."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from grpo_lightning.strategies.emptying import put_in
from grpo_lightning.strategies.fsdp1_shards import cut_like, local_part, shard_of, whole_on_first_rank, whole_weight
from grpo_lightning.strategies.fsdp2 import blocks_of
from grpo_lightning.strategies.placement import Placement, norm_of
from grpo_lightning.types import ConfigurationError


class FSDP1Placement(Placement):
    """Shards of every transformer block, and of what is around the blocks.

    Lightning calls a training or validation step inside of the forward of the outermost unit, for as long as which what
    is around the blocks is whole.

    Args:
        strategy: An `FSDP1Strategy`.
    """

    cuts_weights = True

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy

    def shard(self, policy: nn.Module) -> None:
        """Send the first rank's weights to all others; the strategy cuts them when it makes the units."""
        self.strategy.blocks.update(blocks_of(policy))
        device = self.strategy.root_device
        weights = {}
        for name, weight in policy.named_parameters():
            weights[name] = torch.empty_like(weight, device=device) if weight.is_meta else weight.detach().to(device)
            torch.distributed.broadcast(weights[name], src=0)
        put_in(policy, weights)

    def shard_copy(self, copy: nn.Module, *, of: nn.Module) -> None:
        """Whole on every rank, until the strategy makes the units."""
        self.strategy.blocks.update(blocks_of(copy))
        super().shard_copy(copy, of=of)

    @contextmanager
    def whole(self, policy: nn.Module) -> Iterator[None]:
        """Put all blocks together once, and call them past their units, which would let them go."""
        with ExitStack() as stack:
            for unit in _units(policy):
                stack.enter_context(_summoned(unit))
                unit.forward = unit.module.__call__  # type: ignore[method-assign]
                stack.callback(delattr, unit, "forward")
            yield

    @contextmanager
    def called_together(self, policy: nn.Module) -> Iterator[Callable[[], None]]:
        """Leave the blocks to FSDP1, which puts each together at each call."""

        def pass_by() -> None:
            for unit in _units(policy):
                with _summoned(unit):
                    pass

        yield pass_by

    @classmethod
    def check_precision(cls, policy: nn.Module) -> None:
        """All weights are trained, in single precision at least.

        Raises:
            ConfigurationError: They are not.
        """
        if not all(parameter.requires_grad for parameter in policy.parameters()):
            raise ConfigurationError(
                "model.lora must be null under trainer.strategy: fsdp1, which has frozen and trained weights in one "
                "tensor, with a gradient for all. Set fsdp2."
            )
        super().check_precision(policy)

    @classmethod
    def check_compile(cls) -> None:
        """FSDP1 has other views of the weights in each call."""
        raise ConfigurationError("model.compile must be null under trainer.strategy: fsdp1. Set fsdp2 to shard.")

    @classmethod
    def check_settings(cls, *, engine_has_copy: bool, max_tokens_per_microbatch: int | None) -> None:
        """The whole weights are not sent out, and a micro-batch has one backward pass.

        Raises:
            ConfigurationError: An engine, or a limit, asks for another.
        """
        if engine_has_copy:
            raise ConfigurationError(
                "model.engine must be InProcessEngine under trainer.strategy: fsdp1, which puts no weights together "
                "for a copy of them. Set fsdp2."
            )
        if max_tokens_per_microbatch is not None:
            raise ConfigurationError(
                f"model.max_tokens_per_microbatch must be null under trainer.strategy: fsdp1, whose step is inside of "
                f"a forward, in which there is no backward pass; got {max_tokens_per_microbatch}. "
                "Raise trainer.accumulate_grad_batches, or set fsdp2."
            )

    def weights(self, model: nn.Module, *, trained_only: bool = False) -> dict[str, Tensor]:  # noqa: ARG002
        """Put together on the CPU of the first rank."""
        return whole_on_first_rank(model.state_dict(keep_vars=True))

    def shape(self, weight: Tensor) -> torch.Size:
        """Of all shards."""
        shard = shard_of(weight)
        return weight.shape if shard is None else shard.shape

    def local(self, parameter: nn.Parameter) -> Tensor:
        """Its shard, which may be empty."""
        return local_part(parameter)

    def pairs(self, copy: nn.Module, *, of: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Where two are in one unit, a rank has other elements of the one than of the other."""
        for mine, theirs in zip(copy.parameters(), of.parameters(), strict=True):
            yield local_part(mine), cut_like(mine, whole_weight(theirs))

    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """The root of the squares of all shards."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        device = self.strategy.root_device
        square = norm_of(gradients).square() if gradients else torch.zeros((), dtype=torch.float64, device=device)
        torch.distributed.all_reduce(square)
        return square.sqrt()

    def discard_gradients(self) -> None:
        """As after a step."""
        for optimizer in self.strategy.optimizers:
            optimizer.zero_grad()


def _units(policy: nn.Module) -> list[FullyShardedDataParallel]:
    """The blocks."""
    return FullyShardedDataParallel.fsdp_modules(policy)


def _summoned(unit: FullyShardedDataParallel) -> AbstractContextManager[None]:
    """Inside, a unit's weights are whole. A collective, inside of the outermost unit's forward too."""
    summoned: AbstractContextManager[None] = FullyShardedDataParallel.summon_full_params(
        unit, recurse=False, writeback=False
    )
    return summoned

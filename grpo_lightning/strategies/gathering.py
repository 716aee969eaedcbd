"""What a rollout puts together of weights in shards."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from grpo_lightning.strategies.fsdp2 import blocks_of
from grpo_lightning.strategies.placement import Placement
from grpo_lightning.types import ConfigurationError

GIB = 2**30
_UNITS = {"GiB": GIB, "MiB": 2**20, "KiB": 2**10}


@dataclass(frozen=True, kw_only=True)
class GatheredSize:
    """Bytes of weights, as they are computed with.

    Args:
        whole: Of all.
        around: Of what is around the transformer blocks.
        block: Of the largest block.
    """

    whole: int
    around: int
    block: int

    @property
    def at_once(self) -> int:
        """Most bytes layer by layer: a block is also in the buffer that it comes in."""
        return self.around + 2 * self.block

    def in_words(self, gather: str) -> str:
        """What a choice costs each rank, beside its shards."""
        if gather == "whole":
            return (
                f"Rollouts put all weights together once, {_in_units(self.whole)} on every rank (model.engine.gather)."
            )
        return (
            f"Rollouts put weights together layer by layer, at most {_in_units(self.at_once)} at once on every rank "
            f"(model.engine.gather). The ranks draw in step, and exchange {_in_units(self.whole - self.around)} for "
            "every token of the longest completion."
        )


def check_gathering(gather: str, placement: type[Placement]) -> None:
    """Weights are put together layer by layer where they are in shards.

    Raises:
        ConfigurationError: Every rank has them whole.
    """
    if gather == "layerwise" and not placement.cuts_weights:
        raise ConfigurationError(
            "model.engine.gather must be whole under this trainer.strategy, which has all weights on every rank, got "
            "layerwise.\nSet trainer.strategy to fsdp2 or deepspeed_3 to have them in shards."
        )


def gathered_size(model: nn.Module, nbytes: Callable[[Tensor], int]) -> GatheredSize:
    """Of a model that may be in shards.

    Args:
        model: Tied weights count once.
        nbytes: Of the whole of a weight, where it is computed with.
    """
    blocks = [sum(map(nbytes, block.parameters())) for block in blocks_of(model)]
    whole = sum(map(nbytes, model.parameters()))
    return GatheredSize(whole=whole, around=whole - sum(blocks), block=max(blocks, default=0))


def _in_units(size: int) -> str:
    """In the largest unit of which there is one at least."""
    for unit, num_bytes in _UNITS.items():
        if size >= num_bytes:
            return f"{size / num_bytes:.2f} {unit}"
    return f"{size} bytes"

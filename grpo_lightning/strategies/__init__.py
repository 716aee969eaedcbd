"""Strategies: what Lightning's lack, and where the weights of a run lie under each."""

from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)

from grpo_lightning.strategies.fsdp2 import FSDP2Placement, FSDP2Strategy
from grpo_lightning.strategies.placement import WHOLE, Placement
from grpo_lightning.types import ConfigurationError

StrategyRegistry.register(
    "fsdp2", FSDP2Strategy, description="Shards over all ranks, by torch's fully_shard", override=True
)


def placement_of(strategy: Strategy) -> Placement:
    """Where the weights lie under a strategy: it says so itself by a `placement`, or has them whole.

    Raises:
        ConfigurationError: It shards weights in a way that rollouts and checkpoints here know nothing of.
    """
    placement = getattr(strategy, "placement", None)
    if isinstance(placement, Placement):
        return placement
    if isinstance(strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
        raise ConfigurationError(
            f"trainer.strategy: {type(strategy).__name__} is not supported: rollouts need weights that it has cut. "
            "Set fsdp2 to shard, or ddp."
        )
    return WHOLE


__all__ = ["WHOLE", "FSDP2Placement", "FSDP2Strategy", "Placement", "placement_of"]

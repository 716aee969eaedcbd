"""Strategies: what Lightning's lack, and where the weights of a run lie under each."""

from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)

from grpo_lightning.strategies.fsdp1 import FSDP1Strategy
from grpo_lightning.strategies.fsdp2 import FSDP2Placement, FSDP2Strategy, blocks_of
from grpo_lightning.strategies.placement import WHOLE, Placement
from grpo_lightning.strategies.refused import REASONS, refused
from grpo_lightning.strategies.single import SingleStrategy
from grpo_lightning.strategies.zero import ZeROStrategy, name_accelerator
from grpo_lightning.types import ConfigurationError

NAMES = ("auto", "single", "ddp", "fsdp1", "fsdp2", "deepspeed_1", "deepspeed_2", "deepspeed_3")
"""What `trainer.strategy` may be called."""

StrategyRegistry.register("single", SingleStrategy, description="One process on one device", override=True)
StrategyRegistry.register(
    "fsdp1", FSDP1Strategy, description="Shards over all ranks, by torch's older FSDP", override=True
)
StrategyRegistry.register(
    "fsdp2", FSDP2Strategy, description="Shards over all ranks, by torch's fully_shard", override=True
)
for stage, what in {1: "optimizer states", 2: "and gradients", 3: "and weights"}.items():
    description = f"ZeRO of stage {stage}, by DeepSpeed: shards {what}"
    StrategyRegistry.register(f"deepspeed_{stage}", ZeROStrategy, description, override=True, stage=stage)
for name in REASONS:
    StrategyRegistry.register(name, refused(name), "Refused", override=True)


def placement_of(strategy: Strategy) -> Placement:
    """Where the weights lie under a strategy: it says so itself by a `placement`, or has them whole.

    Raises:
        ConfigurationError: It shards weights in a way that rollouts and checkpoints here know nothing of.
    """
    placement = getattr(strategy, "placement", None)
    return placement if isinstance(placement, Placement) else _whole(strategy)


def placement_kind(strategy: Strategy) -> type[Placement]:
    """The class of that placement; its ranks need not know each other yet.

    Raises:
        ConfigurationError: See `placement_of`; or the strategy cannot have what the Trainer's other settings say.
    """
    kind = getattr(strategy, "placement_kind", None)
    return kind if isinstance(kind, type) and issubclass(kind, Placement) else type(_whole(strategy))


def _whole(strategy: Strategy) -> Placement:
    if isinstance(strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
        raise ConfigurationError(
            f"trainer.strategy: {type(strategy).__name__} is not supported: rollouts need weights that it has cut. "
            "Set fsdp2 or deepspeed_3 to shard, or ddp."
        )
    return WHOLE


__all__ = [
    "NAMES",
    "REASONS",
    "WHOLE",
    "FSDP1Strategy",
    "FSDP2Placement",
    "FSDP2Strategy",
    "Placement",
    "SingleStrategy",
    "ZeROStrategy",
    "blocks_of",
    "name_accelerator",
    "placement_kind",
    "placement_of",
]

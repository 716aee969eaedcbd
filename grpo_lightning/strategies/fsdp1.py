"""FSDP1, Lightning's older way to have weights, gradients and optimizer states in shards."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from grpo_lightning.checkpointing import read_mapped
from grpo_lightning.checkpointing.shards import read_whole
from grpo_lightning.strategies.communication import TIMEOUT_SECONDS, check_backend, timeout_of
from grpo_lightning.strategies.fsdp1_placement import FSDP1Placement
from grpo_lightning.strategies.fsdp1_shards import (
    cut_like,
    local_part,
    name_as_without_units,
    note_shards,
    optimizer_state,
    set_optimizer_state,
    whole_on_first_rank,
)
from grpo_lightning.types import ConfigurationError


class FSDP1Strategy(FSDPStrategy):
    """Lightning's FSDP over all ranks, on GPUs and on CPUs, for what its upstream allows: see docs/scaling.md.

    Lightning's own class refuses CPUs and clipping by norm, and writes checkpoints that no other strategy reads. Here
    checkpoints are single files, and a run resumes under any strategy. New runs are better off under `fsdp2`.

    Args:
        process_group_backend: Of torch.distributed; None takes what suits the device.
        timeout_seconds: See `FSDP2Strategy`.

    Raises:
        ConfigurationError: The backend is not there, or the timeout is none.
    """

    def __init__(self, process_group_backend: str | None = None, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        check_backend(process_group_backend)
        # The ranks call a block as often as each other in an update, but not in the same order of rollouts and updates.
        super().__init__(
            process_group_backend=process_group_backend,
            timeout=timeout_of(timeout_seconds),
            backward_prefetch=None,
        )
        self.blocks: set[nn.Module] = set()

    @property
    def placement_kind(self) -> type[FSDP1Placement]:
        """See `placement_kind`."""
        return FSDP1Placement

    @property
    def placement(self) -> FSDP1Placement:
        """How this strategy shards."""
        return FSDP1Placement(self)

    # The process

    def setup_environment(self) -> None:
        """As Lightning's, with clipping by norm.

        Raises:
            ConfigurationError: Something other than the precision of the policy is asked for.
        """
        precision: Any = self.precision_plugin.precision
        if precision != "32-true":
            raise ConfigurationError(
                f"trainer.precision under fsdp1 must be 32-true, got {precision}: it would average gradients in half "
                "precision. Set fsdp2, whose compute_dtype computes in it and averages in fp32."
            )
        super().setup_environment()
        self.precision_plugin = _ClippingPrecision(self)

    @property
    def mixed_precision_config(self) -> None:
        """The policy's own precision, for computing and for averaging."""
        return

    def _setup_model(self, model: nn.Module) -> nn.Module:
        """Make a unit of each block and one of the rest; on CPUs too, which Lightning's asks for a number of.

        See https://github.com/Lightning-AI/pytorch-lightning/pull/21774.

        Raises:
            ConfigurationError: There is one rank alone, for which torch cuts nothing.
        """
        if self.world_size == 1:
            raise ConfigurationError("trainer.strategy: fsdp1 needs two ranks at least. Set auto for one.")
        root = FullyShardedDataParallel(
            model,
            device_id=self.root_device,
            sharding_strategy=self.sharding_strategy,
            auto_wrap_policy=self._is_unit,
            **self.kwargs,
        )
        for unit in FullyShardedDataParallel.fsdp_modules(root):
            note_shards(unit)
            name_as_without_units(unit)
        return root

    def _is_unit(self, module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:  # noqa: ARG002 - torch's
        return recurse or module in self.blocks

    def block_backward_sync(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """Nothing: within an update too, a rank keeps its shard of the gradient alone."""
        return nullcontext()

    def optimizer_step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Forget the gradient after the step: inside of a forward, torch would put it in place again."""
        output = super().optimizer_step(optimizer, *args, **kwargs)
        optimizer.zero_grad()
        return output

    # Checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights that the module saves, whole, on the first rank. A collective."""
        return whole_on_first_rank(self._saved_weights)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state that the optimizer would have without shards, on the first rank. A collective."""
        return optimizer_state(optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """One file, by the first rank."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """On every rank; tensors of a file are mapped, not read."""
        path = Path(self.broadcast(checkpoint_path))
        return read_mapped(self.checkpoint_io, path, read_folder=read_whole, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:  # noqa: ARG002
        """Read each rank's share of the weights."""
        saved = checkpoint["state_dict"]
        for name, weight in self._saved_weights.items():
            if name in saved:
                local_part(weight).copy_(cut_like(weight, saved[name]))

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimizer's state is in the file."""
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Read each rank's share of the states."""
        (saved,) = checkpoint["optimizer_states"]
        set_optimizer_state(self.optimizers[0], saved)

    @property
    def _saved_weights(self) -> dict[str, Tensor]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict(keep_vars=True)


class _ClippingPrecision(FSDPPrecision):
    """Leaves weights as they are, and clips by the norm of all shards, in this one place, where Lightning refuses to.

    See https://github.com/Lightning-AI/pytorch-lightning/issues/19235.
    """

    def __init__(self, strategy: FSDP1Strategy) -> None:
        super().__init__("32-true")
        self._strategy = strategy

    def convert_module(self, module: nn.Module) -> nn.Module:
        """As it is: the policy has a precision of its own."""
        return module

    def convert_input(self, data: Any) -> Any:
        """As it is: ticks and prompts, in which no number is the model's input."""
        return data

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        """By a norm in fp64; that of torch's own method has fp32 at most. A collective."""
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        norm = self._strategy.placement.gradient_norm(weights).to(weights[0].dtype)
        torch.nn.utils.clip_grads_with_norm_(weights, clip_val, norm)

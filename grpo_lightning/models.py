"""The models of a run: the policy and its reference, where their weights lie, and what is saved of them."""

from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_lightning.batching import InStep
from grpo_lightning.checkpointing import PolicyExport, write_whole
from grpo_lightning.held_out import HeldOutLoops
from grpo_lightning.policy import (
    Compile,
    Policy,
    PolicyRecipe,
    Unadapted,
    adapter_weights,
    frozen_copy,
    is_adapted,
    load_on_first_rank,
    mix,
)
from grpo_lightning.ranks import gather_over_ranks, largest_over_ranks, sum_over_ranks
from grpo_lightning.resumed import ResumedFromWhole
from grpo_lightning.stock_callbacks import admit, averages_weights, check_averaged, keep_reference
from grpo_lightning.strategies import Placement, blocks_of, placement_kind, placement_of


class ModelsOfARun(HeldOutLoops, ResumedFromWhole, ABC):
    """Holds the policy and the reference, whole or in shards, as the Trainer's strategy has it."""

    def __init__(self) -> None:
        super().__init__()
        self.policy: Policy | None = None
        self.reference: Policy | Unadapted | None = None
        self.has_moved_reference = False
        self.register_load_state_dict_post_hook(_forgive_what_is_left_out)  # type: ignore[no-untyped-call]

    def take_checkpoints(self) -> None:
        """Have the Trainer's checkpoints verified, and the policy written beside each."""
        strategy = self.trainer.strategy
        if not isinstance(strategy.checkpoint_io, PolicyExport):
            strategy.checkpoint_io = PolicyExport(strategy.checkpoint_io, self.save_policy, self.choose_checkpoint)

    @property
    def placement(self) -> Placement:
        """Where the weights lie."""
        return placement_of(self.trainer.strategy)

    @property
    def base_checksum(self) -> int | None:
        """Of frozen weights that checkpoints do not have: under the policy's adapter, or of the reference.

        None where there are none.
        """
        return None if self.policy is None else self.policy.base_checksum

    def place(self, recipe: PolicyRecipe, *, with_reference: bool) -> Policy:
        """Make a policy, and as the reference a copy of it, or the policy itself without its adapter. A collective.

        Args:
            recipe: Of the policy.
            with_reference: Whether a reference is asked for.

        Raises:
            ConfigurationError: See `placed`.
        """
        recipe = replace(recipe, has_reference=with_reference)
        self.policy = policy = placed(recipe, self.trainer)  # first, so that its weights have the first numbers
        if with_reference and is_adapted(policy.model):
            self.reference = Unadapted(policy)
        elif with_reference:
            self.reference = reference = frozen_copy(policy)
            self.placement.shard_copy(reference, of=policy)
            recipe.compile_blocks(blocks_of(reference))
        self.engine.called_together = partial(self.placement.called_together, policy)
        return policy

    @property
    def in_step(self) -> InStep | None:
        """What ranks need whose forwards need each other; None where none do."""
        if not self.placement.cuts_weights:
            return None
        agree = partial(largest_over_ranks, num_ranks=self.trainer.world_size, device=self.device)
        return InStep(agree, self._accumulate)

    def undivided(self, loss: Tensor) -> Tensor:
        """Undoes what divides the loss of a training step: the accumulation, and the average over ranks."""
        return loss * float(self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def _accumulate(self, loss: Tensor) -> None:
        """As the Trainer's own backward: outside autocast. The average over ranks alone divides the loss here."""
        with torch.autocast(self.device.type, enabled=False):
            self.placement.accumulate(loss * self.trainer.world_size)

    def _sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        return sum_over_ranks(values, num_ranks=self.trainer.world_size, device=self.device)

    def _gather(self, rows: Tensor) -> Tensor:
        return gather_over_ranks(rows, num_ranks=self.trainer.world_size, device=self.device)

    def move_reference(self, share: float) -> None:
        """Mix the policy into the reference, see `mix`; from here on the reference is in the checkpoint."""
        assert self.policy is not None
        assert isinstance(self.reference, Policy), "controllers check that there is one of its own"
        for of_reference, of_policy in self.placement.pairs(self.reference, of=self.policy):
            mix([of_reference], [of_policy], share=share)
        self.has_moved_reference = True

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The weights, without those of a reference that is still the policy that the run began with.

        Of a policy with an adapter, the adapter's alone. What is left out is taken out of the dictionary itself: a
        module around this one, such as the average of Lightning's `WeightAveraging`, looks at nothing else.
        """
        state: dict[str, Any] = super().state_dict(*args, prefix=prefix, **kwargs)
        is_saved = self._is_saved()
        for name in [name for name in state if name.startswith(prefix) and not is_saved(name.removeprefix(prefix))]:
            del state[name]
        return state

    def _is_saved(self) -> Callable[[str], bool]:
        """What says of a weight's name whether checkpoints have it."""
        if self.policy is not None and is_adapted(self.policy.model):
            names = {f"policy.model.{name}" for name in adapter_weights(self.policy.model)}
            return names.__contains__
        saved = ("policy.", "reference.") if self.has_moved_reference else ("policy.",)
        return lambda name: name.startswith(saved)

    def configure_callbacks(self) -> list[Callback]:
        """Look at the callbacks before any of them is set up."""
        admit(self.trainer)
        return super().configure_callbacks()

    def on_fit_start(self) -> None:
        """Look at the weights that a callback is to average."""
        if averages_weights(self.trainer):
            assert self.policy is not None
            check_averaged(self.policy)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give it the reference that has moved, also where an average stands in the place of the weights."""
        keep_reference(checkpoint)

    @property
    def weight_shapes(self) -> dict[str, torch.Size]:
        """Of what `state_dict` has, whole."""
        return {name: self.placement.shape(weight) for name, weight in self.state_dict(keep_vars=True).items()}

    def export_policy(self, folder: Path) -> None:
        """Write a folder that transformers alone loads, or PEFT where there is an adapter. A collective."""
        assert self.policy is not None
        weights = self.placement.weights(self.policy.model, trained_only=is_adapted(self.policy.model))
        if self.trainer.is_global_zero:
            write_whole(Path(folder), partial(self.policy.save, weights=weights))

    def save_policy(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write such a folder from the weights of a checkpoint, on one rank."""
        assert self.policy is not None
        prefix = "policy.model."
        of_model = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        self.policy.save(folder, weights=of_model)


def placed(recipe: PolicyRecipe, trainer: Trainer) -> Policy:
    """Make a policy and give each rank its share of it. A collective.

    Where weights are cut, the first rank alone ever has all of them, once and in its CPU's memory.

    Raises:
        ConfigurationError: It cannot be made, trained or compiled as the settings want it.
    """
    check_compile(recipe.compile, trainer.strategy)
    strategy, placement = trainer.strategy, placement_of(trainer.strategy)
    if placement.cuts_weights:
        policy = load_on_first_rank(recipe, is_first=trainer.is_global_zero, broadcast=strategy.broadcast)
    else:
        policy = recipe.whole()
    if trainer.training:
        placement.check_precision(policy)
    placement.shard(policy)
    recipe.compile_blocks(blocks_of(policy))
    return policy


def check_compile(compilation: Compile | None, strategy: Strategy) -> None:
    """The blocks of a policy can be compiled, where that is asked for.

    Raises:
        ConfigurationError: The strategy, or the device, is not for it.
    """
    if compilation is not None:
        placement_kind(strategy).check_compile()
        compilation.check(strategy.root_device)


def check_policy(recipe: PolicyRecipe, strategy: Strategy) -> PreTrainedModel | None:
    """Look at a policy that is to be trained before its weights are read.

    Returns:
        See `PolicyRecipe.check`.

    Raises:
        ConfigurationError: See `PolicyRecipe.check` and `Placement.check_precision`.
    """
    skeleton = recipe.check()
    if skeleton is not None:
        placement_kind(strategy).check_precision(skeleton)
    return skeleton


def _forgive_what_is_left_out(module: nn.Module, found: Any) -> None:
    """What `state_dict` leaves out is not missed in what is loaded, also where a module around this one loads it."""
    assert isinstance(module, ModelsOfARun)
    is_saved = module._is_saved()
    left_out = tuple(name for name in nn.Module.state_dict(module) if not is_saved(name))
    found.missing_keys[:] = [name for name in found.missing_keys if not name.endswith(left_out)]

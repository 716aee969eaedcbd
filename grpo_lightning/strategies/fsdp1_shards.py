"""What a rank has of a weight under FSDP1: a run of its elements, somewhere in a flat shard of its unit."""

from collections import ChainMap
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

_CUT = "in shards"
"""Stands for a state that each rank has its elements of."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Of a weight, on this rank.

    Args:
        shape: Of the whole weight.
        start: The first element that is here.
        size: How many are.
        flat: The unit's parameter, which has the shards of all its weights.
        offset: Where in it they begin.
    """

    shape: torch.Size
    start: int
    size: int
    flat: Any
    offset: int

    @property
    def values(self) -> Tensor:
        """The elements, to be read or written in place, also while the weight is whole."""
        local: Tensor = getattr(self.flat, "_local_shard", self.flat.data)  # torch makes the former in the first call
        return local.detach()[self.offset : self.offset + self.size]


def note_shards(unit: FullyShardedDataParallel) -> None:
    """Have each weight of a unit know its shard."""
    if unit._handle is None:
        return
    flat: Any = unit._handle.flat_param
    for weight, shape, info in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
        weight._fsdp1_shard = Shard(
            shape=shape,
            start=info.intra_param_start_idx or 0,
            size=info.numel_in_shard or 0,
            flat=flat,
            offset=info.offset_in_shard or 0,
        )


def shard_of(weight: Tensor) -> Shard | None:
    """None where the weight is in no unit, and whole."""
    return getattr(weight, "_fsdp1_shard", None)


def local_part(weight: Tensor) -> Tensor:
    """This rank's elements of a weight."""
    shard = shard_of(weight)
    return weight.detach() if shard is None else shard.values


def whole_weight(weight: Tensor) -> Tensor:
    """All elements of a weight. A collective."""
    return whole_like(weight, local_part(weight))


def whole_on_first_rank(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All elements of weights by name, on the CPU of the first rank; the others hold one at a time. A collective."""
    is_first = torch.distributed.get_rank() == 0
    found = {}
    for name, weight in weights.items():
        whole = whole_weight(weight)
        if is_first:
            found[name] = whole.cpu()
    return found


def whole_like(weight: Tensor, mine: Tensor | None) -> Tensor:
    """All elements of what is cut as a weight is. A collective.

    Args:
        weight: Of the model.
        mine: This rank's elements; None where it has none.
    """
    shard = shard_of(weight)
    if shard is None:
        assert mine is not None, "it is whole on every rank"
        return mine.detach().clone()
    dtype = shard.values.dtype if mine is None else mine.dtype
    whole = torch.zeros(shard.shape.numel(), dtype=dtype, device=shard.values.device)
    if mine is not None:
        whole[shard.start : shard.start + shard.size] = mine.detach().flatten()
    torch.distributed.all_reduce(whole)
    return whole.view(shard.shape)


def cut_like(weight: Tensor, whole: Tensor) -> Tensor:
    """This rank's elements of what has the shape of a whole weight."""
    shard = shard_of(weight)
    return whole if shard is None else whole.flatten()[shard.start : shard.start + shard.size]


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """The state that an optimizer would have without shards, on the CPU of the first rank. A collective.

    A rank without elements of a weight has no state of it either.
    """
    state = optimizer.state_dict()
    weights = _numbered(optimizer)
    mine = {
        (n, key): _CUT if _is_cut(value) else value
        for n, entries in state["state"].items()
        for key, value in entries.items()
    }
    of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_ranks, mine)
    is_first = torch.distributed.get_rank() == 0
    whole: dict[int, dict[str, Any]] = {}
    for (n, key), value in sorted(ChainMap(*of_ranks).items(), key=lambda entry: entry[0]):
        if isinstance(value, str) and value == _CUT:
            value = whole_like(weights[n], state["state"].get(n, {}).get(key)).cpu()
        if is_first:
            whole.setdefault(n, {})[key] = value
    return {**state, "state": whole}


def set_optimizer_state(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Give each rank its elements of a state without shards."""
    optimizer.load_state_dict({**saved, "state": {}})
    weights = _numbered(optimizer)
    for n, entries in saved["state"].items():
        weight = weights[n]
        device = local_part(weight).device
        optimizer.state[weight] = {
            key: cut_like(weight, value).to(device, copy=True) if _is_cut(value) else deepcopy(value)
            for key, value in entries.items()
        }


def name_as_without_units(unit: nn.Module) -> None:
    """Have `state_dict` give a unit's weights as they are, under the names that they had before it was made one."""
    unit._state_dict_pre_hooks.clear()
    unit._state_dict_hooks.clear()
    unit._register_state_dict_hook(_without_the_unit)


def _without_the_unit(unit: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:  # noqa: ARG001
    inside = f"{prefix}_fsdp_wrapped_module."
    for name in [name for name in state if name.startswith(inside)]:
        state[prefix + name.removeprefix(inside)] = state.pop(name)


def _is_cut(value: Any) -> bool:
    """Whether a state has a number for each element, other than a count of steps."""
    return isinstance(value, Tensor) and value.dim() > 0


def _numbered(optimizer: Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]

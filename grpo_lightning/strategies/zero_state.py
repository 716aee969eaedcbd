"""The state of a run in ZeRO's shards, and whole: as a checkpoint has it under every strategy.

ZeRO steps flat shards in fp32. The states of its optimizer have the shape of those, and exist from the first step on.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

Numbered = Sequence[Sequence[nn.Parameter]]
"""The weights of each parameter group, in the order in which the optimizer was given them."""


def is_cut(weight: Tensor) -> bool:
    """Whether this rank holds a shard of it alone, as under stage 3."""
    return hasattr(weight, "ds_id")


@contextmanager
def gathered(weights: Sequence[Tensor], *, modified: bool = False) -> Iterator[None]:
    """Inside, weights are whole; what is `modified` goes back into the shards. A collective."""
    cut = [weight for weight in weights if is_cut(weight)]
    if not cut:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(cut, modifier_rank=0 if modified else None):
        yield


def whole_weight(weight: Tensor) -> Tensor:
    """A copy of it on the CPU, in the precision in which it is stepped. A collective."""
    if _is_stepped(weight):
        from deepspeed.utils import safe_get_full_fp32_param

        stepped: Tensor = safe_get_full_fp32_param(weight)
        return stepped.detach().cpu().clone()
    with gathered([weight]):
        return weight.detach().cpu().clone()


@torch.no_grad()
def set_whole_weight(weight: Tensor, value: Tensor) -> None:
    """Set what is computed with, and what is stepped. A collective."""
    with gathered([weight], modified=True):
        weight.data.copy_(value)
    if _is_stepped(weight):
        _set_shard(weight, value)


def optimizer_state(optimizer: Any, numbered: Numbered) -> dict[str, Any]:
    """What the `state_dict` of the optimizer would be without ZeRO. A collective.

    Args:
        optimizer: ZeRO's.
        numbered: See `Numbered`.

    Returns:
        The state on the first rank; on the others without the states of the weights.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    is_first = torch.distributed.get_rank() == 0
    state: dict[int, dict[str, Tensor]] = {}
    number_of = _numbers(numbered)
    for weights, flat in _flat_groups(optimizer):
        for weight in weights:
            entries = optimizer.optimizer.state.get(flat, {})
            whole = {
                key: safe_get_full_optimizer_state(weight, key).cpu() if _is_per_element(value, flat) else value.clone()
                for key, value in entries.items()
            }
            if is_first and whole:
                state[number_of[id(weight)]] = whole
    groups = []
    for of_group, group in zip(numbered, optimizer.param_groups, strict=True):
        numbers = [number_of[id(weight)] for weight in of_group]
        groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": numbers})
    return {"state": dict(sorted(state.items())), "param_groups": groups}


def set_optimizer_state(optimizer: Any, numbered: Numbered, saved: dict[str, Any]) -> None:
    """Take up such a state.

    Args:
        optimizer: ZeRO's, which may not have stepped yet.
        numbered: See `Numbered`.
        saved: The `state_dict` of an optimizer of the same class.
    """
    for group, values in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in values.items() if key != "params"})
    number_of = _numbers(numbered)
    for weights, flat in _flat_groups(optimizer):
        states = {weight: saved["state"].get(number_of[id(weight)]) for weight in weights}
        known = [state for state in states.values() if state]
        if known:
            template, shape = known[0], next(weight_shape(w) for w, state in states.items() if state)
            optimizer.optimizer.state[flat] = {
                key: torch.zeros_like(flat) if value.shape == shape and value.dim() else value.clone()
                for key, value in template.items()
            }
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = not optimizer.optimizer.state
        optimizer._lazy_init_hp_params_optimizer_state()
    for weights, flat in _flat_groups(optimizer):
        for weight in weights:
            for key, value in saved["state"].get(number_of[id(weight)], {}).items():
                if _is_per_element(optimizer.optimizer.state[flat][key], flat):
                    _set_shard(weight, value, key)


def weight_shape(weight: Any) -> torch.Size:
    """The shape of the whole of it."""
    return torch.Size(weight.ds_shape) if is_cut(weight) else weight.shape


def _is_stepped(weight: Tensor) -> bool:
    """Whether ZeRO's optimizer has a shard of it."""
    return weight.requires_grad and (hasattr(weight, "_z3_optimizer") or hasattr(weight, "_hp_mapping"))


def _is_per_element(state: Any, flat: Tensor) -> bool:
    """Whether a state has a number for each element of the weights, other than a count of steps."""
    return isinstance(state, Tensor) and state.shape == flat.shape


def _numbers(numbered: Numbered) -> dict[int, int]:
    return {id(weight): number for number, weight in enumerate(chain.from_iterable(numbered))}


def _flat_groups(optimizer: Any) -> list[tuple[list[nn.Parameter], Tensor]]:
    """The weights of each flat shard that is stepped, and the shard."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3
        return list(zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True))
    return list(zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True))


def _set_shard(weight: Any, value: Tensor, key: str | None = None) -> None:
    """Set this rank's shard of what is stepped, or of a state of it."""
    from deepspeed import utils

    if not is_cut(weight):
        weight.set_full_hp_param(value, key)
        return
    size, group = weight.ds_tensor.numel(), weight.ds_process_group
    padded = value.new_zeros(size * torch.distributed.get_world_size(group))
    padded[: value.numel()] = value.flatten()
    shard = padded.narrow(0, size * torch.distributed.get_rank(group), size)
    if key is None:
        utils.safe_set_local_fp32_param(weight, shard)
    else:
        utils.safe_set_local_optimizer_state(weight, shard, key)

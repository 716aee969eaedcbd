"""Tensors of which this rank may hold a shard."""

from collections.abc import Iterable
from itertools import chain

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from grpo_lightning.strategies import FSDP1Strategy, ZeROStrategy
from grpo_lightning.strategies.fsdp1_shards import local_part, shard_of, whole_like, whole_weight
from grpo_lightning.strategies.zero_state import set_whole_weight, weight_shape


def whole(tensor: Tensor) -> Tensor:
    """All of it. A collective."""
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    if shard_of(tensor):
        return whole_weight(tensor)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def set_whole(weight: Tensor, value: Tensor) -> None:
    """Set all of it, and what ZeRO steps of it. A collective."""
    if isinstance(weight, DTensor):
        weight.copy_(distribute_tensor(value, weight.device_mesh, weight.placements))
    else:
        set_whole_weight(weight, value)


def set_all(weights: Iterable[Tensor], values: Tensor) -> None:
    """Set those that are trained to the values of all, one after another. A collective."""
    offset = 0
    for weight in weights:
        shape = weight_shape(weight)
        if weight.requires_grad:
            set_whole(weight, values[offset : offset + shape.numel()].view(shape))
        offset += shape.numel()


def whole_gradient(parameter: Tensor) -> Tensor:
    """That of a weight, before the optimizer steps. A collective."""
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)
    if shard_of(parameter):
        return whole_like(parameter, parameter.grad)
    return whole(parameter.grad)


def optimizer_states(trainer: Trainer) -> dict[int, dict[str, Tensor]]:
    """The states of the weights by number, on the first rank at least. A collective."""
    optimizer = trainer.optimizers[0]
    if isinstance(trainer.strategy, ZeROStrategy):
        return trainer.strategy.optimizer_state(optimizer)["state"]
    if isinstance(trainer.strategy, FSDP1Strategy):
        return trainer.strategy.optimizer_state(optimizer)["state"]
    return tree_map(whole, optimizer.state_dict()["state"])


def num_accumulated(trainer: Trainer) -> int:
    """How many gradients DeepSpeed's optimizer holds back for a step, or would add to the next."""
    if not isinstance(trainer.strategy, ZeROStrategy):
        return 0
    optimizer = trainer.strategy.deepspeed_engine.optimizer
    held = [*optimizer.averaged_gradients.values(), *getattr(optimizer, "all_grad_tensors", {}).values()]
    return sum(gradients is not None for gradients in held)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of it, or all of it."""
    if hasattr(tensor, "ds_id"):
        return torch.cat([tensor.ds_tensor, tensor.data.flatten()])  # the latter is empty, but where it is kept whole
    if shard_of(tensor):
        return local_part(tensor)
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held_bytes(trainer: Trainer) -> dict[str, int]:
    """What this rank holds of the policy's weights, of their gradients and of the optimizer's states.

    Memory that two of them share is counted once. The masters of ZeRO's stage 3 are the optimizer's in its step alone,
    and not counted before it: see `measured_states`.
    """
    weights = list(trainer.lightning_module.policy.parameters())
    optimizer = trainer.optimizers[0]
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    stepped: Iterable[Tensor] = ()
    if isinstance(trainer.strategy, ZeROStrategy):
        gradients += [part for part in chain(*filter(None, optimizer.averaged_gradients.values())) if part is not None]
        optimizer = optimizer.optimizer
        stepped = chain(*(group["params"] for group in optimizer.param_groups))
    states = chain(*(state.values() for state in optimizer.state.values()))
    held = {
        "weights": storages(chain(*(parts(weight) for weight in weights))),
        "gradients": storages(map(local, gradients)),
        "optimizer": storages(map(local, chain(stepped, states))),
    }
    held["optimizer"] = {key: size for key, size in held["optimizer"].items() if key not in held["weights"]}
    return {name: sum(storages.values()) for name, storages in held.items()}


def parts(weight: Tensor) -> list[Tensor]:
    """What this rank holds of a weight."""
    return [weight.ds_tensor, weight.data] if hasattr(weight, "ds_id") else [local(weight)]


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by address."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in found}

"""Tensors of which this rank may hold a shard."""

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from grpo_lightning.strategies import ZeROStrategy


def whole(tensor: Tensor) -> Tensor:
    """All of it. A collective."""
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_gradient(parameter: Tensor) -> Tensor:
    """That of a weight, before the optimizer steps. A collective."""
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)
    return whole(parameter.grad)


def optimizer_states(trainer: Trainer) -> dict[int, dict[str, Tensor]]:
    """The states of the weights by number, on the first rank at least. A collective."""
    optimizer = trainer.optimizers[0]
    if isinstance(trainer.strategy, ZeROStrategy):
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
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

"""FSDP2: weights, gradients and optimizer states in shards, put together layer by layer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from grpo_lightning.strategies.emptying import take_out
from grpo_lightning.strategies.placement import Placement, norm_of


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism over all ranks, on GPUs and on CPUs.

    Lightning's own class shards nothing by itself, and by default divides a machine by tensors, not by data.
    Checkpoints are single files with the whole state, as the other strategies write them: a run resumes under any.

    Args:
        compute_dtype: Of the weights in forward and backward. Weights, gradients, their reduction and the optimizer
            states stay in the policy's own precision; "bfloat16" is what GPUs are fast in.
        process_group_backend: Of torch.distributed; None takes what suits the device.
    """

    def __init__(
        self,
        compute_dtype: Literal["bfloat16", "float16"] | None = None,
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
        )
        self.compute_dtype = compute_dtype

    def setup_environment(self) -> None:
        """All ranks hold shards of one copy."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load weights and optimizer states, and leave the weights in what is returned, to be looked at."""
        optimizers, self.optimizers = self.optimizers, []  # their states have numbers that Lightning's class misreads
        try:
            checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        finally:
            self.optimizers = optimizers
        whole = torch.load(checkpoint_path, mmap=True, map_location="cpu", weights_only=weights_only)
        for optimizer, state in zip(optimizers, whole["optimizer_states"], strict=False):
            self._load_optimizer(optimizer, state)
        return {**checkpoint, "state_dict": whole["state_dict"]}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state on the first rank, under the numbers that any other strategy gives the weights."""
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, optimizer, options=options)
        return renamed(state, {name: number for number, name in enumerate(self._trained_names)})

    def _load_optimizer(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        named = renamed(state, dict(enumerate(self._trained_names)))
        set_optimizer_state_dict(self.model, optimizer, optim_state_dict=named, options=options)

    @property
    def _trained_names(self) -> list[str]:
        """In the order of the optimizer, which is given these weights alone."""
        assert self.model is not None
        return [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    @property
    def placement(self) -> Placement:
        """How this strategy shards."""
        return FSDP2Placement(self.device_mesh["data_parallel"], self.root_device, self.compute_dtype)


class FSDP2Placement(Placement):
    """Shards of every transformer block, and of what is around the blocks.

    Args:
        mesh: The ranks that share one copy.
        device: This rank's.
        compute_dtype: See `FSDP2Strategy`.
    """

    cuts_weights = True

    def __init__(self, mesh: DeviceMesh, device: torch.device, compute_dtype: str | None) -> None:
        self.mesh, self.device, self.compute_dtype = mesh, device, compute_dtype

    def shard(self, policy: nn.Module) -> None:
        """Cut the model while it has no weights; then the first rank deals them out, one after the other."""
        weights = take_out(policy)
        self._cut(policy)
        for name, parameter in policy.named_parameters():
            weight = weights.pop(name)
            whole = torch.empty_like(weight, device=self.device) if weight.is_meta else weight
            dealt: Any = distribute_tensor(whole, self.mesh, parameter.placements)  # type: ignore[attr-defined]
            self.local(parameter).copy_(dealt.to_local())

    def shard_copy(self, copy: nn.Module, *, of: nn.Module) -> None:
        """Each rank has what it needs."""
        self._cut(copy)
        for mine, theirs in zip(copy.parameters(), of.parameters(), strict=True):
            self.local(mine).copy_(self.local(theirs))

    def _cut(self, policy: nn.Module) -> None:
        """Shard each block by itself, so that one alone is ever whole in the update; shards have no values yet."""
        options: dict[str, Any] = {"mesh": self.mesh}
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        if not trained:
            options["reshard_after_forward"] = True  # no backward comes that would cut the outermost layers again
        if self.compute_dtype is not None:
            dtype = trained[0].dtype if trained else None
            options["mp_policy"] = MixedPrecisionPolicy(getattr(torch, self.compute_dtype), reduce_dtype=dtype)
        for block in blocks_of(policy):
            fully_shard(block, **options)
        fully_shard(policy, **options)
        policy._apply(lambda tensor: torch.empty_like(tensor, device=self.device) if tensor.is_meta else tensor)

    @contextmanager
    def whole(self, policy: nn.Module) -> Iterator[None]:
        """Put all layers together once, and keep them so."""
        sharded = _sharded(policy)
        _name_the_root(policy)
        for module in sharded:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in sharded:
                module.reshard()
                module.set_reshard_after_forward(module is not policy, recurse=False)
            _forget_the_calls(policy)

    @contextmanager
    def called_together(self, policy: nn.Module) -> Iterator[Callable[[], None]]:
        """Put together what is around the blocks, and leave these to FSDP2, which does so at each call."""
        _name_the_root(policy)
        root, *blocks = _sharded(policy)

        def pass_by() -> None:
            for block in blocks:
                block.unshard()
                block.reshard()

        root.unshard()
        try:
            yield pass_by
        finally:
            root.reshard()
            _forget_the_calls(policy)

    def itemsize(self, weight: Tensor) -> int:
        """As `compute_dtype` says."""
        if self.compute_dtype is None:
            return super().itemsize(weight)
        dtype: torch.dtype = getattr(torch, self.compute_dtype)
        return dtype.itemsize

    def weights(self, model: nn.Module, *, trained_only: bool = False) -> dict[str, Tensor]:
        """Put together on the CPU of the first rank."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
        weights: dict[str, Any] = get_model_state_dict(model, options=options)
        return weights

    def local(self, parameter: nn.Parameter) -> Tensor:
        """Its shard."""
        assert isinstance(parameter, DTensor), "the weights are sharded"
        shard: Tensor = parameter.detach().to_local()  # type: ignore[attr-defined]
        return shard

    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """The root of the squares of all shards."""
        gradients = [p.grad.to_local() for p in parameters if isinstance(p.grad, DTensor)]
        square = norm_of(gradients).square()
        torch.distributed.all_reduce(square, group=self.mesh.get_group())
        return square.sqrt()


def renamed(state: dict[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """An optimizer's state with other names, or numbers, of the weights.

    Args:
        state: What `Optimizer.state_dict` returns, or nothing.
        names: The new ones by the old ones.
    """
    if not state:
        return {}
    groups = [{**group, "params": [names[old] for old in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[old]: value for old, value in state["state"].items()}, "param_groups": groups}


def blocks_of(policy: nn.Module) -> list[nn.Module]:
    """The transformer blocks: the longest list of modules that a language model has.

    Example: the `layers` of a Llama, the `h` of a GPT-2.
    """
    lists = [module for module in policy.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=()))


def _sharded(policy: nn.Module) -> list[Any]:
    """The modules that are put together by themselves: the policy, and its blocks in the order of their calls."""
    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


def _forget_the_calls(policy: nn.Module) -> None:
    """Those of a rollout, of which each rank makes as many as it likes.

    In a backward pass FSDP2 puts together in advance the block that was called before. Where that was in a rollout,
    some ranks would do so, and others not.
    """
    for module in _sharded(policy):
        state = module._get_fsdp_state()
        state._comm_ctx.post_forward_order.clear()
        if (group := state._fsdp_param_group) is not None:
            group._post_forward_indices.clear()


def _name_the_root(policy: nn.Module) -> None:
    """FSDP2 takes the module that is called first for the root, and a rollout calls the language model inside it."""
    assert isinstance(policy, FSDPModule), "the policy is sharded before it is called"
    policy._get_fsdp_state()._lazy_init()

"""FSDP2: weights, gradients and optimizer states in shards, put together layer by layer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from grpo_lightning.checkpointing import PolicyExport, read_mapped
from grpo_lightning.checkpointing.shards import FOLDER, read_rest, read_states, read_weights, save_shards
from grpo_lightning.strategies.communication import TIMEOUT_SECONDS, check_backend, give_up_after, timeout_of
from grpo_lightning.strategies.emptying import take_out
from grpo_lightning.strategies.placement import Placement, norm_of


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism over all ranks, on GPUs and on CPUs.

    Lightning's own class shards nothing by itself, and by default divides a machine by tensors, not by data.
    A run resumes under any other strategy, and any number of ranks.

    Args:
        compute_dtype: Of the weights in forward and backward. Weights, gradients, their reduction and the optimizer
            states stay in the policy's own precision; "bfloat16" is what GPUs are fast in.
        checkpoint: "whole" for single files with the whole state, which the first rank puts together in its CPU's
            memory; "sharded" for folders to which each rank writes its shards, for models whose state does not fit
            there. All machines must see the folder.
        process_group_backend: Of torch.distributed; None takes what suits the device.
        timeout_seconds: How long ranks wait for each other in a collective before they give up a rank that hangs, and
            the run. It must be longer than the slowest rollout, its scoring and a checkpoint take.

    Raises:
        ConfigurationError: The backend is not there, or the timeout is none.
    """

    def __init__(
        self,
        compute_dtype: Literal["bfloat16", "float16"] | None = None,
        checkpoint: Literal["whole", "sharded"] = "whole",
        process_group_backend: str | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        check_backend(process_group_backend)
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=checkpoint == "sharded",
            process_group_backend=process_group_backend,
            timeout=timeout_of(timeout_seconds),
        )
        self.compute_dtype = compute_dtype
        self.checkpoint = checkpoint
        self.timeout_seconds = timeout_seconds

    def setup_environment(self) -> None:
        """All ranks hold shards of one copy."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        give_up_after(timeout_of(self.timeout_seconds), self.device_mesh["data_parallel"].get_group())

    # Checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights that the module saves: in shards, or whole on the first rank. A collective."""
        return self._to_be_saved(self._saved_weights)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Likewise the optimizer's state, under the numbers that any other strategy gives the weights. A collective."""
        state = optimizer.state_dict()
        return {**state, "state": {number: self._to_be_saved(entries) for number, entries in state["state"].items()}}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """One file, by the first rank, or a folder, by all. A collective."""
        if self.checkpoint == "whole":
            Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)
            return
        path = Path(self.broadcast(filepath))
        weights = self._gathered(checkpoint["state_dict"])
        prepared = None
        if self.is_global_zero and isinstance(self.checkpoint_io, PolicyExport):
            prepared = self.checkpoint_io.prepare(path, weights)
        del weights
        save_shards(path, checkpoint, self._trained_names, policy=prepared)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """On every rank, but for its tensors: those of a file are mapped, those of a folder have shapes alone."""
        path = Path(self.broadcast(checkpoint_path))
        return read_mapped(self.checkpoint_io, path, read_folder=read_rest, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:  # noqa: ARG002
        """Read each rank's share of the weights."""
        saved = checkpoint["state_dict"]
        weights = {name: weight for name, weight in self._saved_weights.items() if name in saved}
        if FOLDER in checkpoint:
            read_weights(Path(checkpoint[FOLDER]), weights)
            return
        for name, weight in weights.items():
            weight.copy_(_cut_like(weight, saved[name]))

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimizer's state is in the checkpoint."""
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Read each rank's share of the states."""
        (optimizer,), (saved,) = self.optimizers, checkpoint["optimizer_states"]
        optimizer.load_state_dict({**saved, "state": {}})
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        if FOLDER in checkpoint:
            by_name = dict(zip(self._trained_names, weights, strict=True))
            for name, entries in read_states(Path(checkpoint[FOLDER]), by_name).items():
                optimizer.state[by_name[name]] = entries
            return
        for number, entries in saved["state"].items():
            weight = weights[number]
            optimizer.state[weight] = {
                key: _cut_like(weight, value) if value.shape == weight.shape and value.dim() else value.clone()
                for key, value in entries.items()
            }

    @property
    def _saved_weights(self) -> dict[str, Tensor]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def _to_be_saved(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors) if self.checkpoint == "sharded" else self._gathered(tensors)

    def _gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole on the CPU of the first rank; the others, which hold one at a time, have none. A collective."""
        gathered = {}
        for name, tensor in tensors.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.is_global_zero:
                gathered[name] = whole.cpu()
        return gathered

    @property
    def _trained_names(self) -> list[str]:
        """In the order of the optimizer, which is given these weights alone."""
        assert self.model is not None
        return [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    @property
    def placement_kind(self) -> type[Placement]:
        """See `placement_kind`."""
        return FSDP2Placement

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


def _cut_like(weight: Tensor, whole: Tensor) -> Tensor:
    """The shards of a whole tensor that every rank has, cut as a weight is."""
    if not isinstance(weight, DTensor):
        return whole
    return distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)


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

"""FSDP2: weights, gradients and optimizer states in shards, put together layer by layer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

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
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        whole = torch.load(checkpoint_path, mmap=True, map_location="cpu", weights_only=weights_only)
        return {**checkpoint, "state_dict": whole["state_dict"]}

    @property
    def placement(self) -> Placement:
        """How this strategy shards."""
        return FSDP2Placement(self.device_mesh["data_parallel"], self.compute_dtype)


class FSDP2Placement(Placement):
    """Shards of every transformer block, and of what is around the blocks.

    Args:
        mesh: The ranks that share one copy.
        compute_dtype: See `FSDP2Strategy`.
    """

    def __init__(self, mesh: DeviceMesh, compute_dtype: str | None) -> None:
        self.mesh, self.compute_dtype = mesh, compute_dtype

    def shard(self, policy: nn.Module) -> None:
        """Shard each block by itself, so that one alone is ever whole in the update."""
        options: dict[str, Any] = {"mesh": self.mesh}
        if not any(parameter.requires_grad for parameter in policy.parameters()):
            options["reshard_after_forward"] = True  # no backward comes that would cut the outermost layers again
        if self.compute_dtype is not None:
            dtype = next(policy.parameters()).dtype
            options["mp_policy"] = MixedPrecisionPolicy(getattr(torch, self.compute_dtype), reduce_dtype=dtype)
        for block in blocks_of(policy):
            fully_shard(block, **options)
        fully_shard(policy, **options)

    @contextmanager
    def whole(self, policy: nn.Module) -> Iterator[None]:
        """Put all layers together once, and keep them so."""
        sharded = [module for module in policy.modules() if isinstance(module, FSDPModule)]
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

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Put together on the CPU of the first rank."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
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


def blocks_of(policy: nn.Module) -> list[nn.Module]:
    """The transformer blocks: the longest list of modules that a language model has.

    Example: the `layers` of a Llama, the `h` of a GPT-2.
    """
    lists = [module for module in policy.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=()))


def _name_the_root(policy: nn.Module) -> None:
    """FSDP2 takes the module that is called first for the root, and a rollout calls the language model inside it."""
    assert isinstance(policy, FSDPModule), "the policy is sharded before it is called"
    policy._get_fsdp_state()._lazy_init()

"""Where ZeRO has weights and gradients: weights whole under stages 1 and 2, in shards under stage 3."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grpo_lightning.strategies.emptying import put_in, take_out
from grpo_lightning.strategies.fsdp2 import blocks_of
from grpo_lightning.strategies.placement import Placement, norm_of
from grpo_lightning.strategies.zero_state import gathered, is_cut, weight_shape, whole_weight
from grpo_lightning.types import ConfigurationError


class ZeROPlacement(Placement):
    """Whole weights, and the gradients in the optimizer's shards.

    Args:
        strategy: A `ZeROStrategy`.
    """

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy

    @classmethod
    def check_precision(cls, policy: nn.Module) -> None:
        """Copies are stepped, in single precision."""

    @property
    def _optimizer(self) -> Any:
        """ZeRO's."""
        return self.strategy.deepspeed_engine.optimizer

    def weights(self, model: nn.Module, *, trained_only: bool = False) -> dict[str, Tensor]:
        """Put together on the CPU of the first rank, in full precision."""
        weights = {}
        for name, weight in model.state_dict(keep_vars=True).items():
            if trained_only and not weight.requires_grad:
                continue
            whole = whole_weight(weight)
            if self.strategy.is_global_zero:
                weights[name] = whole
        return weights

    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """The root of the squares of all shards."""
        shards = [shard for parameter in parameters if (shard := self._gradient_shard(parameter)) is not None]
        device = self.strategy.root_device
        square = norm_of(shards).square() if shards else torch.zeros((), dtype=torch.float64, device=device)
        torch.distributed.all_reduce(square)
        return square.sqrt()

    def _gradient_shard(self, parameter: Any) -> Tensor | None:
        """This rank's, once the backward passes are done; None where it has none."""
        if parameter._hp_mapping is None:
            return None
        shard: Tensor = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
        return shard

    def discard_gradients(self) -> None:
        """As DeepSpeed does where a gradient overflowed."""
        optimizer = self._optimizer
        optimizer.zero_grad()
        optimizer.micro_step_id = -1
        for group in range(len(optimizer.bit16_groups)):
            optimizer.averaged_gradients[group] = None
            optimizer.all_grad_tensors[group] = None
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()


class ZeRO3Placement(ZeROPlacement):
    """Shards of every weight, of the reference too; DeepSpeed's hooks put a module together while it is called."""

    cuts_weights = True

    def shard(self, policy: nn.Module) -> None:
        """Put one weight after the other in place, for DeepSpeed to deal out what the first rank has."""
        weights = take_out(policy)
        for name in list(weights):
            weight = weights.pop(name)
            self._cut(policy, name, torch.empty_like(weight, device="cpu") if weight.is_meta else weight)
        self._move_buffers(policy)

    def shard_copy(self, copy: nn.Module, *, of: nn.Module) -> None:
        """Each rank has what it needs."""
        originals = dict(of.named_parameters())
        for name, weight in list(copy.named_parameters()):
            cut = self._cut(copy, name, torch.zeros_like(weight, device="cpu"))
            self.local(cut).copy_(self.local(originals[name]))
        self._move_buffers(copy)

    def _cut(self, model: nn.Module, name: str, weight: Tensor) -> nn.Parameter:
        """Have DeepSpeed send the first rank's values of a weight to the others, and leave each its shard."""
        import deepspeed

        first: Any = next(model.parameters())
        put_in(model, {name: weight.to(self.strategy.compute_dtype)})
        parameter = model.get_parameter(name)
        if is_cut(first):
            first.convert_to_zero_parameters([parameter])
        else:
            config = {**self.strategy.config, "train_micro_batch_size_per_gpu": 1}  # which it asks for, and ignores
            deepspeed.zero.Init(
                module=nn.ParameterList([parameter]), config_dict_or_path=config, dtype=self.strategy.compute_dtype
            )
        return parameter

    def _move_buffers(self, model: nn.Module) -> None:
        """DeepSpeed leaves a model where it is whose weights are cut."""
        model._apply(lambda tensor: tensor if is_cut(tensor) else tensor.to(self.strategy.root_device))

    @contextmanager
    def whole(self, policy: nn.Module) -> Iterator[None]:
        """Put all weights together once, and keep the hooks from taking them apart after each call."""
        with self._without_hooks(policy), gathered([*policy.parameters()]):
            yield

    @contextmanager
    def called_together(self, policy: nn.Module) -> Iterator[Callable[[], None]]:
        """Put together what is around the blocks, and each block while it is called.

        DeepSpeed's own hooks would keep what has 1e9 elements, and a list of all calls.
        """
        blocks = [[*block.parameters()] for block in blocks_of(policy)]
        in_blocks = {id(weight) for block in blocks for weight in block}
        around = [weight for weight in policy.parameters() if id(weight) not in in_blocks]

        def pass_by() -> None:
            for block in blocks:
                with gathered(block):
                    pass

        with self._without_hooks(policy), gathered(around):
            for block in blocks_of(policy):
                _gather_at_calls(block)
            yield pass_by

    @contextmanager
    def _without_hooks(self, policy: nn.Module) -> Iterator[None]:
        """Inside, DeepSpeed neither puts weights together nor lets them go. Hooks that are added do not stay."""
        offload = self._offload
        offload.get_param_coordinator().release_and_reset_all(offload.module)  # also waits for what is on its way
        with _without(policy, {hook.id for hook in (*offload.forward_hooks, *offload.backward_hooks)}):
            yield

    def itemsize(self, weight: Tensor) -> int:
        """As the Trainer's precision says."""
        dtype = self.strategy.compute_dtype
        return super().itemsize(weight) if dtype is None else int(dtype.itemsize)

    @property
    def _offload(self) -> Any:
        """What cuts the weights: part of the optimizer, or alone where nothing is trained."""
        return getattr(self._optimizer, "parameter_offload", self._optimizer)

    @classmethod
    def check_compile(cls) -> None:
        """DeepSpeed's hooks inside the blocks put weights together."""
        raise ConfigurationError(
            "model.compile must be null under trainer.strategy: deepspeed_3, which puts weights together inside the "
            "blocks. Set fsdp2 to shard."
        )

    def shape(self, weight: Tensor) -> torch.Size:
        """Of all shards."""
        return weight_shape(weight)

    def local(self, parameter: Any) -> Tensor:
        """Its shard; a whole copy, of which small weights are kept, is let go."""
        if not is_cut(parameter):
            return super().local(parameter)
        if parameter.ds_status.name == "AVAILABLE":
            parameter.partition()
        shard: Tensor = parameter.ds_tensor
        return shard

    def _gradient_shard(self, parameter: Any) -> Tensor | None:
        from deepspeed.utils import safe_get_local_grad

        shard: Tensor = safe_get_local_grad(parameter)
        rank = torch.distributed.get_rank(parameter.ds_process_group)
        return shard.flatten()[: max(0, parameter.ds_numel - rank * shard.numel())]  # the rest is padding

    def accumulate(self, loss: Tensor) -> None:
        """As in a micro-batch that ends no update."""
        engine = self.strategy.deepspeed_engine
        ends_update = engine.is_gradient_accumulation_boundary()
        engine.set_gradient_accumulation_boundary(False)
        engine.backward(loss, scale_wrt_gas=False)
        self._optimizer.clear_backward_seen_flag()  # the next backward adds to what this one has left
        engine.set_gradient_accumulation_boundary(ends_update)

    def discard_gradients(self) -> None:
        """As DeepSpeed does where a gradient overflowed."""
        self._optimizer.zero_grad()
        self._optimizer.averaged_gradients = {}


def _gather_at_calls(block: nn.Module) -> None:
    """Put a block together before each call of it, and let it go after."""
    weights, called = [*block.parameters()], ExitStack()
    block.register_forward_pre_hook(lambda *_: called.enter_context(gathered(weights)))
    block.register_forward_hook(lambda *_: called.close())


@contextmanager
def _without(model: nn.Module, hooks: set[int]) -> Iterator[None]:
    """Inside, a model's modules are called without the hooks of these numbers."""
    with ExitStack() as stack:
        for module in model.modules():
            for name in ("_forward_hooks", "_forward_pre_hooks"):
                all_hooks: OrderedDict[int, Any] = getattr(module, name)
                stack.callback(setattr, module, name, all_hooks)
                setattr(module, name, OrderedDict((k, hook) for k, hook in all_hooks.items() if k not in hooks))
        yield

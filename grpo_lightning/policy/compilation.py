"""torch.compile for the transformer blocks of a policy."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from inspect import unwrap
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn

from grpo_lightning.types import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Compile:
    """Compiles each transformer block of the update's forward and backward, in place.

    Names of weights stay, so that checkpoints are those of a run without it. Block by block, since what is around the
    blocks (sharding, gradient checkpointing of whole pieces) calls them as before. Rollouts decode without it: with
    every token keys and values have another shape.

    Args:
        backend: Of torch.compile; `inductor` makes kernels, with Triton on GPUs and with a C++ compiler on CPUs.
        mode: Of inductor; None for its default.
        dynamic: Whether shapes are left open from the start; None leaves those open that are seen to change.

    Raises:
        ConfigurationError: There is no such backend, or it has no modes.
    """

    backend: str = "inductor"
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = None
    dynamic: bool | None = None

    def __post_init__(self) -> None:
        backends = torch._dynamo.list_backends(exclude_tags=())
        if self.backend not in backends:
            raise ConfigurationError(f"model.compile.backend must be one of {backends}, got {self.backend!r}.")
        if self.mode is not None and self.backend != "inductor":
            raise ConfigurationError(
                f"model.compile.mode is a setting of the backend inductor, got {self.mode!r} with {self.backend!r}."
            )

    def check(self, device: torch.device) -> None:
        """What the backend needs is there.

        Args:
            device: Of the run.

        Raises:
            ConfigurationError: It is not.
        """
        if self.backend != "inductor":
            return
        if device.type == "cpu" and not _has_cpp_compiler():
            raise ConfigurationError(
                "model.compile.backend: inductor needs a C++ compiler on a CPU, and none was found. Install g++, name "
                "one in the environment variable CXX, or set aot_eager."
            )
        if device.type == "cuda" and not torch.utils._triton.has_triton():
            raise ConfigurationError("model.compile.backend: inductor needs Triton on a GPU: pip install triton")

    def compile(self, blocks: Iterable[nn.Module]) -> None:
        """Have the blocks compiled when they are first called."""
        for block in blocks:
            for module in block.modules():
                _leave_hooks_out(module)
            self._compile(block)

    def _compile(self, block: Any) -> None:
        """Its forward alone: sharding hangs on the call around it, and recomputation too must call what is compiled."""
        forward = unwrap(type(block).forward)
        settings: Any = {"backend": self.backend, "mode": self.mode, "dynamic": self.dynamic}
        compiled = torch.compile(MethodType(forward, block), **settings)
        if getattr(block, "gradient_checkpointing", False):
            recompute = block._gradient_checkpointing_func
            block._gradient_checkpointing_func = lambda whole, *args: recompute(
                partial(compiled, **whole.keywords), *args
            )
        else:
            block.forward = compiled


def _leave_hooks_out(module: nn.Module) -> None:
    """Call a module's hooks as they are: with numbers of their own in each layer, each would be compiled for itself."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number, hook in hooks.items():
            hooks[number] = torch.compiler.disable(hook)


def _has_cpp_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True

"""Norms and feed-forward layers that keep less for the backward pass, in place of a model's own."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import PreTrainedModel

from grpo_lightning.functional.rms_norm import rms_norm, rms_norm_and_scale
from grpo_lightning.functional.swiglu import swiglu

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class LeanRMSNorm(nn.Module):
    """`rms_norm` under the names of transformers' modules.

    Args:
        norm: What it takes the place of, whose weight it shares.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self.variance_epsilon = _eps(norm)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The normed states."""
        return rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)

    def extra_repr(self) -> str:
        """Shape and epsilon."""
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class LeanMLP(nn.Module):
    """A feed-forward layer around `swiglu` under the names of transformers' modules.

    Args:
        mlp: What it takes the place of, whose submodules it shares.
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        for name, module in mlp.named_children():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        output: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return output


@torch.no_grad()
def make_lean(model: PreTrainedModel) -> None:
    """Put our layers in place of those that compute the same, with their weights and under their names.

    Asking the layers is safer than a list of names: one that gives another output for some states stays, as does one
    on the meta device, which gives none, and one whose forward is not its class's. Whatever goes wrong in the attempt
    means that a layer stays.
    """
    for name, module in list(model.named_modules()):
        if not _is_as_its_class_made_it(module):
            continue
        is_norm = _looks_like_a_norm(module) and _agrees(_is_the_norm, module)
        if is_norm or (_looks_like_an_mlp(module) and _agrees(_is_the_mlp, module)):
            put_lean_layers(model, [name])


def lean_layers(model: nn.Module) -> tuple[str, ...]:
    """The names of the layers that are ours."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, LeanRMSNorm | LeanMLP))


def put_lean_layers(model: nn.Module, names: Iterable[str]) -> None:
    """Put our layers in place of these, without asking them."""
    for name in names:
        module = model.get_submodule(name)
        kind = LeanRMSNorm if _looks_like_a_norm(module) else LeanMLP
        model.set_submodule(name, kind(module).train(module.training))


def _agrees(compare: Callable[[Any], bool], module: nn.Module) -> bool:
    """Without a trace in the random numbers: a projection may draw some."""
    with torch.random.fork_rng(devices=[]):
        try:
            return compare(module)
        except Exception:
            return False


def _is_as_its_class_made_it(module: nn.Module) -> bool:
    is_own = isinstance(module, LeanRMSNorm | LeanMLP)
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    on_meta = any(parameter.is_meta for parameter in module.parameters())
    return not (is_own or "forward" in vars(module) or any(hooks) or on_meta)


def _looks_like_a_norm(module: nn.Module) -> bool:
    weights = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    return type(module).__name__.endswith("RMSNorm") and weights == ["weight"] and _eps(module) is not None


def _looks_like_an_mlp(module: nn.Module) -> bool:
    children = {name for name, _ in module.named_children()}
    return children == {*_PROJECTIONS, "act_fn"} and not (module._parameters or module._buffers)


def _is_the_norm(norm: Any) -> bool:
    """To the bit, in the precision of the weight and in that of autocast.

    With a weight of another kind than ones, beside which it would not show whether they come before a cast or after.
    """
    norm, eps = deepcopy(norm), _eps(norm)
    weight_D = norm.weight.copy_(_states(norm.weight.shape[-1], norm.weight, norm.weight.dtype)[2])
    for dtype in (weight_D.dtype, torch.bfloat16):
        states_ND = _states(weight_D.shape[-1], weight_D, dtype)
        if not _equal(norm(states_ND), rms_norm_and_scale(states_ND, weight_D, eps)[0]):
            return False
    return True


def _is_the_mlp(mlp: Any) -> bool:
    """Its activation by itself as well, which a projection of zeros would hide."""
    weight = next(mlp.parameters())
    states_ND = _states(mlp.gate_proj.in_features, weight, weight.dtype)
    is_silu = _equal(mlp.act_fn(states_ND), silu(states_ND))
    return is_silu and _equal(mlp(states_ND), LeanMLP(mlp)(states_ND))


def _states(width: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Four tokens, from one beside whose square an epsilon is large to one beside which it is nothing."""
    generator = torch.Generator().manual_seed(0)
    states_ND = torch.randn(4, width, generator=generator) * torch.tensor([[1e-4], [1e-2], [1.0], [100.0]])
    return states_ND.to(device=like.device, dtype=dtype)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _eps(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))

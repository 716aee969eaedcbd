"""Defects to put into the framework for a moment, so that a property is seen able to fail."""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

PACKAGE = "grpo_lightning."


@dataclass(frozen=True)
class Mutant:
    """Replaces what `target` names, below the package, by what `wrap` makes of it."""

    name: str
    target: str
    wrap: Callable[[Any], Any]

    def apply(self, monkeypatch: pytest.MonkeyPatch) -> None:
        target = PACKAGE + self.target
        monkeypatch.setattr(target, self.wrap(pkgutil.resolve_name(target)))


def wrong_sign(target: str) -> Mutant:
    return Mutant("wrong sign", target, lambda function: lambda *args, **kwargs: -function(*args, **kwargs))


def times(factor: float, name: str, target: str) -> Mutant:
    return Mutant(name, target, lambda function: lambda *args, **kwargs: factor * function(*args, **kwargs))


def keyword(name: str, target: str, **changes: Callable[[Any], Any]) -> Mutant:
    """Hands in other values of keywords."""

    def wrap(function):
        def mutated(*args, **kwargs):
            return function(*args, **{**kwargs, **{key: change(kwargs[key]) for key, change in changes.items()}})

        return mutated

    return Mutant(name, target, wrap)


def swapped_ddof(target: str) -> Mutant:
    return keyword("ddof swapped", target, ddof=lambda ddof: 1 - ddof)


def replaced(name: str, target: str, function: Callable[..., Any]) -> Mutant:
    return Mutant(name, target, lambda original: function)


def without_last(mask_BT: torch.Tensor) -> torch.Tensor:
    """The mask without the last loss token of each completion."""
    return mask_BT & torch.nn.functional.pad(mask_BT[:, 1:], (0, 1))


def mask_off_by_one(target: str) -> Mutant:
    """Of an aggregation: the last token of a completion is forgotten."""

    def wrap(function):
        def mutated(values_BT, mask_BT, *args, **kwargs):
            return function(values_BT, without_last(mask_BT), *args, **kwargs)

        return mutated

    return Mutant("mask off by one", target, wrap)


def not_detached(name: str, target: str) -> Mutant:
    """A function that detaches what it is given no longer does."""

    def wrap(function):
        def mutated(*args, **kwargs):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.Tensor, "detach", lambda tensor: tensor)
                return function(*args, **kwargs)

        return mutated

    return Mutant(name, target, wrap)

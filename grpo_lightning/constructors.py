"""What settings a class has, as the parser sees them: the parameters of its constructor and of its parents'."""

import inspect
import pkgutil
import sys
from types import FunctionType, UnionType
from typing import Any, get_args, get_type_hints


def class_of(class_path: str) -> type:
    """The class at a class path; for a function, the type of functions, which has no settings that are looked into."""
    found = pkgutil.resolve_name(class_path)
    return found if isinstance(found, type) else type(found)


def settings_of(owner: type) -> list[str]:
    """The names of the constructor's parameters, those of parent classes included."""
    names = dict.fromkeys(name for initializer in _initializers(owner) for name in _parameters(initializer))
    return [name for name in names if name not in ("self", "args", "kwargs")]


def hint_of(owner: type, name: str) -> Any:
    """The type of a constructor's parameter; None where it has no such parameter, or its type cannot be read."""
    initializer = next((i for i in _initializers(owner) if name in _parameters(i)), None)
    try:
        return get_type_hints(initializer).get(name) if initializer else None
    except NameError:  # other packages import some types for the type checker alone
        return None


def owner_of(class_path: str, names: list[str]) -> tuple[type, str]:
    """Follow `names` from the class of `class_path` into its settings, to the first that its owner does not have."""
    owner = class_of(class_path)
    for name in names[:-1]:
        hint = hint_of(owner, name)
        alternatives = [hint, *get_args(hint)]
        child = next((a for a in alternatives if isinstance(a, type) and a not in (type(None), UnionType)), None)
        if child is None:
            return owner, name
        owner = child
    return owner, names[-1]


def known_classes() -> set[str]:
    """The names that short class paths resolve to: what the command line has imported."""
    prefixes = ("grpo_lightning", "lightning.pytorch.callbacks", "lightning.pytorch.loggers")
    modules = [module for name, module in sys.modules.items() if name.startswith(prefixes)]
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type) and not name.startswith("_") and value.__module__.startswith(prefixes)
    }


def _initializers(owner: type) -> list[FunctionType]:
    return [vars(parent)["__init__"] for parent in owner.__mro__ if "__init__" in vars(parent)]


def _parameters(initializer: FunctionType) -> list[str]:
    return list(inspect.signature(initializer).parameters)

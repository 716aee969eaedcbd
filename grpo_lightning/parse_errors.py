"""What the parser says of a bad setting, cut down to the key, what was expected and what came.

jsonargparse reports every alternative of every union that it tried, nested, with the whole value that it was given:
twenty lines for a misspelt word. The first reason in it that says anything is the one a person needs.
"""

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from types import FunctionType, UnionType
from typing import get_args, get_type_hints

import yaml
from lightning.pytorch import Trainer

from grpo_lightning.types import ConfigurationError

LONGEST_LINE = 300

_KEY = re.compile(r'^Parser key "(?P<key>[^"]+)":\s*(?P<reason>.*)$')
_CLASS = re.compile(r"^Problem with given class_path '(?P<path>[^']+)':$")
_GIVEN = re.compile(r"^Given value: (?:NestedArg\(key='.*', val=(?P<nested>.*)\)|(?P<value>.*))$")
_NOISE = re.compile(
    r"^(Does not validate against any|Subtypes:|Errors:|Given value type:|Expected a path but"
    r"|Expected a <class 'NoneType'>|Not a valid subclass of|Subclass types expect one of:|a class path|a dict with|$)"
)
_ALTERNATIVE = re.compile(r"^Expected an? (?P<type>(?!dot import path)(?!.*Got value:).+)$")

_UNKNOWN = re.compile(
    r"^(?:Option '|Group '(?P<group>[\w.]+)' does not accept option '|Subcommand '\w+' does not accept option '"
    r"|unrecognized arguments: --)(?P<key>[\w.]+)"
)
_REQUIRED = re.compile(r"^the following arguments are required: (?P<keys>.+)$")
_NO_CLASS = re.compile(r"^Expected a dot import path string: (?P<name>.+)$")
_MISMATCH = re.compile(r"^Expected an? (?P<type>.+)\. Got value: (?P<value>.*)$")
_PLAIN_TYPES = {"int": "a whole number", "float": "a number", "str": "a string", "bool": "true or false"}


@dataclass
class _Problem:
    """What could be read from the parser's message, from its first reason upwards."""

    keys: list[str] = field(default_factory=list)
    class_path: str | None = None
    reason: str = ""
    alternatives: list[str] = field(default_factory=list)
    given: str | None = None

    def key(self, name: str | None = None) -> str:
        """The YAML key in question, without `init_args` and the name of the subcommand."""
        return ".".join([*self.keys, *([name] if name else [])]).replace("init_args.", "")


def condense(message: str) -> str:
    """Say in at most three lines what the parser says in twenty.

    Args:
        message: Of jsonargparse's `ArgumentError`.

    Returns:
        The YAML key, what was expected and what came; for a misspelt name, the likely one.
    """
    problem = _read(message)
    return _three_lines(_explain(problem) if problem.keys or problem.reason else message)


def check_config_files(args: Sequence[str]) -> None:
    """Read the config files that a command line names, since the parser does not say which of them is broken.

    Args:
        args: The command line.

    Raises:
        ConfigurationError: A file does not exist, is not YAML or holds no settings; the message names file and line.
    """
    for option, value in zip_longest(args, args[1:]):
        name, _, path = option.partition("=") if "=" in option else (option, "", value)
        if name not in ("--config", "-c"):
            continue
        try:
            content = yaml.safe_load(Path(path or "").expanduser().read_text())
        except OSError as error:
            raise ConfigurationError(f"--config: cannot read {path!r}: {error.strerror}.") from error
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else "?"
            raise ConfigurationError(f"{path}, line {line} is not YAML: {error.problem}.") from error
        if not isinstance(content, dict):
            raise ConfigurationError(f"{path} must hold settings as `key: value`, got {str(content)[:50]!r}.")


def _read(message: str) -> _Problem:
    problem = _Problem()
    for line in (raw.strip().removeprefix("- ") for raw in message.splitlines()):
        if key := _KEY.match(line):
            problem.keys.append(key["key"])
            problem.reason = key["reason"]
        elif named := _CLASS.match(line):
            problem.class_path = named["path"]
        elif given := _GIVEN.match(line):
            problem.given = given["nested"] or repr(given["value"])
        elif _NOISE.match(line):
            continue
        elif alternative := _ALTERNATIVE.match(line):
            problem.alternatives.append(alternative["type"])
        else:
            problem.reason = line
        if problem.reason or problem.given:
            break
    return problem


def _explain(problem: _Problem) -> str:
    if unknown := _UNKNOWN.match(problem.reason):
        name = f"{unknown['group']}.{unknown['key']}" if unknown["group"] else unknown["key"]
        return _unknown_setting(problem, name.replace("init_args.", ""))
    if required := _REQUIRED.match(problem.reason):
        names = [re.sub(r"^(fit|validate|test|predict)\.", "", name) for name in required["keys"].split(", ")]
        return f"{', '.join(problem.key(name) for name in names)} must be given."
    if mismatch := _MISMATCH.match(problem.reason):
        return f"{problem.key()} must be {_plain(mismatch['type'])}, got {mismatch['value']!r}."
    if missing := _NO_CLASS.match(problem.reason):
        return f"{problem.key()}: no class is called {missing['name']!r}" + _did_you_mean(
            missing["name"], _known_classes(), otherwise="; a class of your own is named with its file: `file.Class`."
        )
    if not problem.reason and not problem.alternatives:
        return _not_a_class(problem)
    if not problem.reason:
        return f"{problem.key()} must be {' or '.join(map(_plain, problem.alternatives))}, got {problem.given}."
    if problem.class_path:
        return f"{problem.key()}: cannot load the class {problem.class_path!r}: {problem.reason}."
    return f"{problem.key()}: {problem.reason}" if problem.keys else problem.reason


def _unknown_setting(problem: _Problem, name: str) -> str:
    if problem.class_path is None:
        known = [f"trainer.{setting}" for setting in _settings(Trainer)]
        return f"There is no setting {name!r}" + _did_you_mean(name, [*known, "trainer", "model", "data"])
    if name.endswith("class_path"):
        return _not_a_class(problem)
    owner, unknown = _owner(problem.class_path, name.split("."))
    where = f"{owner.__name__} has no setting {unknown!r}"
    return f"{problem.key(name)}: {where}{_did_you_mean(unknown, _settings(owner))}"


def _not_a_class(problem: _Problem) -> str:
    return f"{problem.key()} must have a `class_path`, its settings under `init_args`, and nothing else."


def _owner(class_path: str, names: list[str]) -> tuple[type, str]:
    """Follow `names` from the class of `class_path` into its settings, to the first that its owner does not have."""
    module, _, class_name = class_path.rpartition(".")
    owner: type = getattr(importlib.import_module(module), class_name)
    for name in names[:-1]:
        hint = next((get_type_hints(i)[name] for i in _initializers(owner) if name in _parameters(i)), None)
        alternatives = [hint, *get_args(hint)]
        child = next((a for a in alternatives if isinstance(a, type) and a not in (type(None), UnionType)), None)
        if child is None:
            return owner, name
        owner = child
    return owner, names[-1]


def _settings(owner: type) -> list[str]:
    """The names of the constructor's parameters, those of parent classes included."""
    names = dict.fromkeys(name for initializer in _initializers(owner) for name in _parameters(initializer))
    return [name for name in names if name not in ("self", "args", "kwargs")]


def _initializers(owner: type) -> list[FunctionType]:
    return [vars(parent)["__init__"] for parent in owner.__mro__ if "__init__" in vars(parent)]


def _parameters(initializer: FunctionType) -> list[str]:
    return list(inspect.signature(initializer).parameters)


def _known_classes() -> set[str]:
    """The names that short class paths resolve to: what the command line has imported."""
    prefixes = ("grpo_lightning", "lightning.pytorch.callbacks", "lightning.pytorch.loggers")
    modules = [module for name, module in sys.modules.items() if name.startswith(prefixes)]
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type) and not name.startswith("_") and value.__module__.startswith(prefixes)
    }


def _did_you_mean(name: str, known: Iterable[str], *, otherwise: str = ".") -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else otherwise


def _plain(type_name: str) -> str:
    """The parser's name of a type, as a person would write it."""
    name = re.sub(r"^<class '(.+)'>$", r"\1", type_name)
    if literal := re.match(r"^typing\.Literal\[(.+)\]$", name):
        return f"one of {literal[1]}"
    return _PLAIN_TYPES.get(name, name)


def _three_lines(message: str) -> str:
    lines = [line.rstrip() for line in message.strip().splitlines() if line.strip()][:3]
    return "\n".join(line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..." for line in lines)

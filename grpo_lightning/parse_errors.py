"""What the parser says of a bad setting, cut down to the key, what was expected and what came.

jsonargparse reports every alternative of every union that it tried, nested, with the whole value that it was given:
twenty lines for a misspelt word. The first reason in it that says anything is the one a person needs.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, is_dataclass
from inspect import isabstract
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import StrategyRegistry
from torch.optim import Optimizer

from grpo_lightning.constructors import class_of, hint_of, known_classes, owner_of, settings_of
from grpo_lightning.strategies import REASONS
from grpo_lightning.types import ConfigurationError

LONGEST_LINE = 300
_BASES = (LightningModule, LightningDataModule)
"""What the parser falls back to where a config names no class."""

_KEY = re.compile(r'^Parser key "(?P<key>[^"]+)":\s*(?P<reason>.*)$')
_CLASS = re.compile(r"^Problem with given class_path '(?P<path>[^']+)':$")
_GIVEN = re.compile(r"^Given value: (?:NestedArg\(key='.*', val=(?P<nested>.*)\)|(?P<value>.*))$")
_NOISE = re.compile(
    r"^(Does not validate against any|Subtypes:|Errors:|Given value type:|Expected a path but"
    r"|Expected a <class 'NoneType'>|Not a valid subclass of|Subclass types expect one of:|a class path|a dict with|$)"
)
_CALLABLE = re.compile(r"^Type typing\.Callable.* expects a function or a callable class: (?P<reason>.*)$")
_ITS_CLASS = re.compile(r"\. Got value: Namespace\(class_path='(?P<path>[^']+)'.*$")
_ALTERNATIVE = re.compile(r"^Expected an? (?P<type>(?!dot import path)(?!.*Got value:).+)$")

_UNKNOWN = re.compile(
    r"^(?:Option '|Group '(?P<group>[\w.]+)' does not accept option '|Subcommand '\w+' does not accept option '"
    r"|unrecognized arguments: --)(?P<key>[\w.]+)"
)
_REQUIRED = re.compile(r"^the following arguments are required: (?P<keys>.+)$")
_NO_CLASS = re.compile(r"^(?:Expected a dot import path string|Unexpected import path format): (?P<name>.+)$")
_NO_CALLABLE = re.compile(r"^Expected an import path or a subclass spec, but got ")
_NO_GROUP = re.compile(r"^Unable to load config (?P<value>'.*'|\".*\")$")
_NOT_LOADED = re.compile(r"^(?P<reason>.+)\. Got value: (?P<name>[\w.]+)\.?$")
_MISMATCH = re.compile(r"^Expected an? (?P<type>.+)\. Got value: (?P<value>.*)$")
_MAPPING = "\"{'"
"""How a value begins that is a mapping, as it is quoted."""
_PLAIN_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
}


@dataclass
class _Problem:
    """What could be read from the parser's message, from its first reason upwards."""

    keys: list[str] = field(default_factory=list)
    class_path: str | None = None
    """The class, of those on the way, that was looked into last, and how many keys lead to it."""
    num_keys_to_class: int = 0
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


def is_of_union(error: Exception) -> bool:
    """Whether the parser wraps what a constructor raised, in words alone: of `trainer.strategy`, for instance."""
    return isinstance(error, ValueError) and str(error).startswith("Does not validate against any of the Union")


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
        if not path:
            raise ConfigurationError("--config must be followed by a file.")
        try:
            content = yaml.safe_load(Path(path).expanduser().read_text())
        except OSError as error:
            raise ConfigurationError(f"--config: cannot read {path!r}: {error.strerror}.") from error
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else "?"
            raise ConfigurationError(f"{path}, line {line} is not YAML: {error.problem}.") from error
        if not isinstance(content, dict):
            raise ConfigurationError(f"{path} must hold settings as `key: value`, got {str(content)[:50]!r}.")


def check_groups(settings: Namespace) -> None:
    """Refuse what the parser lets through: a plain value for a group of settings, and settings of no optimizer.

    Args:
        settings: What was parsed for a command.

    Raises:
        ConfigurationError: There is such a value; the message names its key.
    """
    if not isinstance(settings.get("trainer"), Namespace):
        raise ConfigurationError(_not_a_group("trainer", None, repr(settings.get("trainer"))))
    for name in ("model", "data"):
        _check_value(settings.get(name), None, name)


def _check_value(value: Any, hint: Any, key: str) -> None:
    if isinstance(value, Namespace) and "class_path" in value:
        owner = class_of(value.class_path)
        _check_settings(value.get("init_args"), owner, key)
        if issubclass(owner, Optimizer):
            _check_optimizer(owner, value.get("init_args"), key)
    elif isinstance(hint, type) and is_dataclass(hint):
        if not isinstance(value, Namespace):
            raise ConfigurationError(_not_a_group(key, hint, repr(value)))
        _check_settings(value, hint, key)


def _check_settings(settings: Namespace | None, owner: type, key: str) -> None:
    for name, value in vars(settings).items() if settings else ():
        _check_value(value, hint_of(owner, name), f"{key}.{name}")


def _check_optimizer(owner: type[Optimizer], settings: Namespace | None, key: str) -> None:
    """Build the optimizer over a stand-in, for only its constructor knows what it accepts."""
    try:
        owner([torch.nn.Parameter(torch.zeros(2, 2))], **(settings.as_dict() if settings else {}))
    except ValueError as error:
        raise ConfigurationError(f"{key}: {owner.__name__} refuses its settings: {error}.") from error


def _read(message: str) -> _Problem:
    problem = _Problem()
    for raw in message.splitlines():
        line = _without_callable(raw.strip().removeprefix("- "), problem)
        if key := _KEY.match(line):
            problem.keys.append(key["key"])
            problem.reason = key["reason"]
        elif named := _CLASS.match(line):
            problem.class_path, problem.num_keys_to_class = named["path"], len(problem.keys)
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


def _without_callable(line: str, problem: _Problem) -> str:
    """What is wrong with a class that makes something, an optimizer for instance, as it is said of other classes."""
    wrapped = _CALLABLE.match(line)
    if wrapped is None:
        return line
    if its_class := _ITS_CLASS.search(wrapped["reason"]):
        problem.class_path, problem.num_keys_to_class = its_class["path"], len(problem.keys)
    return _ITS_CLASS.sub("", wrapped["reason"])


def _explain(problem: _Problem) -> str:
    if unknown := _UNKNOWN.match(problem.reason):
        name = f"{unknown['group']}.{unknown['key']}" if unknown["group"] else unknown["key"]
        return _unknown_setting(problem, name.replace("init_args.", ""))
    if required := _REQUIRED.match(problem.reason):
        names = [re.sub(r"^(fit|validate|test|predict)\.", "", name) for name in required["keys"].split(", ")]
        return f"{', '.join(problem.key(name) for name in names)} must be given."
    if _NO_CALLABLE.match(problem.reason):
        return _not_a_class(problem)
    if mismatch := _MISMATCH.match(problem.reason):
        return _mismatch(problem.key(), _plain(mismatch["type"]), mismatch["value"])
    if group := _NO_GROUP.match(problem.reason):
        return _not_a_group(problem.key(), _group(problem), group["value"])
    missing = _NO_CLASS.match(problem.reason)
    if missing and "<class 'str'>" in problem.alternatives:
        return _name_with_settings(problem.key(), missing["name"])
    if missing and problem.alternatives:
        return f"{problem.key()} must be {' or '.join(map(_plain, problem.alternatives))}, got {missing['name']!r}."
    if missing:
        return f"{problem.key()}: no class is called {missing['name']!r}" + _did_you_mean(
            missing["name"], known_classes(), otherwise="; a class of your own is named with its file: `file.Class`."
        )
    if not problem.reason and (not problem.alternatives or (problem.given or "").startswith(_MAPPING)):
        return _not_a_class(problem)
    if not problem.reason:
        return f"{problem.key()} must be {' or '.join(map(_plain, problem.alternatives))}, got {problem.given}."
    if not_loaded := _NOT_LOADED.match(problem.reason):
        return f"{problem.key()}: cannot load the class {not_loaded['name']!r}: {not_loaded['reason']}."
    if problem.class_path:
        return f"{problem.key()}: cannot load the class {problem.class_path!r}: {problem.reason}."
    return f"{problem.key()}: {problem.reason}" if problem.keys else problem.reason


def _mismatch(key: str, expected: str, got: str) -> str:
    hint = "\nYAML takes what follows a # for a comment: write \"['#']\" for a list with one." if got == "None" else ""
    return f"{key} must be {expected}, got {got!r}.{hint if expected == 'a list' else ''}"


def _unknown_setting(problem: _Problem, name: str) -> str:
    if problem.class_path is None:
        known = [f"trainer.{setting}" for setting in settings_of(Trainer)]
        return f"There is no setting {name!r}" + _did_you_mean(name, [*known, "trainer", "model", "data"])
    if name.endswith("class_path"):
        return _not_a_class(problem)
    owner, unknown = owner_of(problem.class_path, name.split("."))
    if owner in _BASES:
        return _not_a_class(problem)
    where = f"{owner.__name__} has no setting {unknown!r}"
    return f"{problem.key(name)}: {where}{_did_you_mean(unknown, settings_of(owner))}"


def _name_with_settings(key: str, name: str) -> str:
    """A strategy's name, where a class is needed since there are settings; or a class that does not exist."""
    if key == "trainer.strategy" and name == "auto":
        return (
            f"{key} is auto, which takes no settings. Name the class that they are of:\n"
            "{class_path: FSDP2Strategy, init_args: {...}} (or FSDP1Strategy, ZeROStrategy, DDPStrategy)"
        )
    if key != "trainer.strategy" or name not in StrategyRegistry:
        return f"{key}: {name!r} is not the name of a class, and only a class takes settings."
    if name in REASONS:
        return f"{key}: {name} {REASONS[name]}"
    registered = StrategyRegistry[name]
    settings = "".join(f"{setting}: {value}, " for setting, value in registered["init_params"].items())
    return (
        f"{key}: the name {name!r} takes no settings. Give its class in the place of the name:\n"
        f"{{class_path: {registered['strategy'].__name__}, init_args: {{{settings}...}}}}"
    )


def _not_a_class(problem: _Problem) -> str:
    if group := _group(problem):
        return _not_a_group(problem.key(), group, str(problem.given))
    return f"{problem.key()} must have a `class_path`, its settings under `init_args`, and nothing else."


def _not_a_group(key: str, group: type | None, got: str) -> str:
    names = settings_of(group) if group else []
    listed = f" ({', '.join(names)})" if names else ""
    return f"{key} must be a group of settings{listed}, got {got}."


def _group(problem: _Problem) -> type | None:
    """The class whose settings the key in question groups; None where it is to be named by its class path."""
    names = ".".join(problem.keys[problem.num_keys_to_class :]).split(".")
    if problem.class_path is None:
        return None
    owner, name = owner_of(problem.class_path, [*names, ""])
    return owner if not name and is_dataclass(owner) and not isabstract(owner) else None


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

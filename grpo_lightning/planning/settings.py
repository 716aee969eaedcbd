"""What a config says about memory. It is read as YAML: nothing that it names is built but the policy's skeleton."""

import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from grpo_lightning import batching, policy
from grpo_lightning.planning.states import OptimizerStates, Sharding
from grpo_lightning.preconditions import check_precision
from grpo_lightning.types import ConfigurationError

_STRATEGIES = ("single", "ddp", "fsdp2", "deepspeed_1", "deepspeed_2", "deepspeed_3")
_SHARDING = ("fsdp2", "deepspeed_3")
"""Those that have weights in shards."""
_PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")
_ITEMSIZES = {"bfloat16": 2, "float16": 2, "bf16": 2, "16": 2}


class Settings:
    """Files of settings, of which a later one wins.

    Args:
        paths: YAML files.

    Raises:
        ConfigurationError: A file cannot be read, or holds no settings.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._all: dict[str, Any] = {}
        for path in paths:
            self._all = laid_over(self._all, _read(path))

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a YAML key without its `init_args`; the default where there is none, or null."""
        found: Any = self._all
        for name in key.split("."):
            inner = found.get("init_args") if isinstance(found, Mapping) and name not in found else found
            found = inner.get(name) if isinstance(inner, Mapping) else None
        return default if found is None else found

    def has(self, key: str) -> bool:
        """Whether the key is there, be it with null."""
        owner, _, name = key.rpartition(".")
        settings = self.get(owner, {})
        return name in settings or name in (settings.get("init_args") or {})

    def require(self, key: str) -> Any:
        """Its value.

        Raises:
            ConfigurationError: There is none.
        """
        if (value := self.get(key)) is None:
            raise ConfigurationError(f"plan: {key} must be given.")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """The value of a key that is a whole number.

        Raises:
            ConfigurationError: It is not there and has no default, or is no whole number >= 1.
        """
        value = self.require(key) if default is None else self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigurationError(f"plan: {key} must be a whole number >= 1, got {value!r}.")
        return value

    def optional_count(self, key: str) -> int | None:
        """Likewise, or None where the key is not there, or null."""
        return None if self.get(key) is None else self.count(key)

    def made(self, key: str, package: Any) -> Any:
        """What a class path and its `init_args` build; short names are found in `package`."""
        path, settings = _class_of(self.require(key), key)
        owner = getattr(package, path, None) or _named(path, key)
        return _built(owner, settings, key)


def policy_source(settings: Settings) -> policy.PolicySource:
    """Where the policy comes from: of a folder that is made first and is not there yet, from what makes it."""
    made_by, path = settings.get("model.policy.made_by"), settings.get("model.policy.path")
    if made_by is not None and path is not None and not Path(path).exists():
        settings = Settings([made_by])
    source: policy.PolicySource = _of_kind(settings.made("model.policy", policy), policy.PolicySource, "model.policy")
    return source


def lora_of(settings: Settings) -> policy.LoRA | None:
    """What of the policy is trained; None for all weights."""
    given = settings.get("model.lora")
    return None if given is None else _built(policy.LoRA, given, "model.lora")


def layout_of(settings: Settings) -> batching.Layout:
    """How the update's forwards are laid out."""
    made = settings.made("model.layout", batching) if settings.get("model.layout") else batching.SharedPrefix()
    layout: batching.Layout = _of_kind(made, batching.Layout, "model.layout")
    return layout


def sharding_of(settings: Settings, ranks: int) -> Sharding:
    """The strategy, and in which precision it computes.

    Raises:
        ConfigurationError: The strategy is not known here, or cannot put weights together layer by layer.
    """
    strategy, key = settings.get("trainer.strategy", "auto"), "trainer.strategy"
    name = _class_of(strategy, key)[0].rsplit(".", 1)[-1]
    stage = settings.get(f"{key}.stage", 2) if not isinstance(strategy, str) else None
    name = {
        "auto": "single" if ranks == 1 else "ddp",
        "FSDP2Strategy": "fsdp2",
        "DDPStrategy": "ddp",
        "SingleDeviceStrategy": "single",
        "SingleStrategy": "single",
        "ZeROStrategy": f"deepspeed_{stage}",
    }.get(name, name)
    if name not in _STRATEGIES:
        raise ConfigurationError(f"trainer.strategy: plan knows {', '.join(_STRATEGIES)}, got {name}.")
    engine = str(settings.get("model.engine.class_path", "")).rsplit(".", 1)[-1]
    is_layerwise = settings.get("model.engine.gather") == "layerwise"
    if is_layerwise and name not in _SHARDING:
        raise ConfigurationError(f"model.engine.gather must be whole under {name}, got layerwise.")
    compute_dtype = settings.get(f"{key}.compute_dtype") if name == "fsdp2" and not isinstance(strategy, str) else None
    return Sharding(
        name=name,
        ranks=ranks,
        offload=bool(not isinstance(strategy, str) and settings.get(f"{key}.offload", False)),
        compute_itemsize=_ITEMSIZES.get(str(compute_dtype)) or trainer_itemsize(settings, name),
        is_layerwise=is_layerwise or engine.startswith("VLLM"),  # which compares its copy layer by layer
    )


def precision_of(settings: Settings) -> str:
    """The Trainer's, by the longer of its two names.

    Raises:
        ConfigurationError: It is not known here, or refused.
    """
    given = str(settings.get("trainer.precision", "32-true"))
    precision = {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}.get(given, given)
    check_precision(precision)
    if precision not in _PRECISIONS:
        raise ConfigurationError(f"trainer.precision: plan knows {', '.join(_PRECISIONS)}, got {given}.")
    return precision


def trainer_itemsize(settings: Settings, strategy: str) -> int | None:
    """Bytes of a weight that the Trainer's precision converts it to; None where it leaves it alone."""
    kind, _, how = precision_of(settings).partition("-")
    is_converted = how == "true" or strategy.startswith("deepspeed")
    return _ITEMSIZES.get(kind) if is_converted else None


def is_autocast(settings: Settings, strategy: str) -> bool:
    """Whether torch casts the inputs of products by itself: DeepSpeed converts the weights instead."""
    return precision_of(settings).endswith("-mixed") and not strategy.startswith("deepspeed")


def optimizer_states(settings: Settings) -> OptimizerStates:
    """What the optimizer keeps, seen from one that has made a step.

    Only states of a weight's own shape grow with it: what factors take is left out.
    """
    parameter = torch.nn.Parameter(torch.ones(5, 7))
    key = "model.optimizer"
    path, given = _class_of(settings.require(key), key)
    optimizer: torch.optim.Optimizer = _built(_named(path, key), given, key, [parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
    per_element = sum(state.shape == parameter.shape for state in states)
    return OptimizerStates(per_element, sum(state.nbytes for state in states if state.shape != parameter.shape))


def laid_over(below: Any, above: Any) -> Any:
    """Two groups of settings as one. Another class drops the settings of the one before it."""
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    if "class_path" in above and above["class_path"] != below.get("class_path", above["class_path"]):
        return above
    return {**below, **{key: laid_over(below.get(key), value) for key, value in above.items()}}


def _class_of(given: Any, key: str) -> tuple[str, Any]:
    """Its class path and settings."""
    if isinstance(given, str):
        return given, {}
    if not isinstance(given, Mapping) or not isinstance(given.get("class_path"), str):
        raise ConfigurationError(f"{key} must have a `class_path`, its settings under `init_args`, got {given!r}.")
    return given["class_path"], given.get("init_args") or {}


def _built(owner: Any, settings: Any, key: str, *args: Any) -> Any:
    """What a class makes of its settings, which nothing has looked at yet."""
    if not isinstance(settings, Mapping):
        raise ConfigurationError(f"{key} must be a group of settings, got {settings!r}.")
    try:
        return owner(*args, **settings)
    except ConfigurationError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{key}: {error}.") from error


def _of_kind(found: Any, kind: Any, key: str) -> Any:
    if not isinstance(found, kind):
        raise ConfigurationError(f"{key} must be a {kind.__name__}, got a {type(found).__name__}.")
    return found


def _named(path: str, key: str) -> Any:
    try:
        return pkgutil.resolve_name(path if "." in path else f"torch.optim:{path}")
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"{key}: no class is called {path!r}.") from error


def _read(path: str) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load(Path(path).expanduser().read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigurationError(f"--config: cannot read {path!r}: {error}") from error
    if not isinstance(found, Mapping):
        raise ConfigurationError(f"{path} must hold settings as `key: value`.")
    return found

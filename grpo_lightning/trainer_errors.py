"""What is wrong with a setting of the Trainer, by its YAML key."""

import difflib
import re
from typing import Any

from lightning.pytorch import Trainer, strategies
from lightning.pytorch.strategies import StrategyRegistry

from grpo_lightning import strategies as our_strategies
from grpo_lightning.constructors import settings_of
from grpo_lightning.strategies import NAMES
from grpo_lightning.types import ConfigurationError


def check_strategy_name(strategy: Any) -> None:
    """A strategy that is named alone has that name.

    Args:
        strategy: The setting `trainer.strategy`, a name or a class with its settings.

    Raises:
        ConfigurationError: None is called so.
    """
    if not isinstance(strategy, str) or strategy.lower() in ("auto", *StrategyRegistry):
        return
    if hasattr(our_strategies, strategy) or hasattr(strategies, strategy):
        raise ConfigurationError(
            f"trainer.strategy: {strategy} is a class, which a name alone does not make. "
            f"Write {{class_path: {strategy}}} in its place, or give --trainer.strategy.class_path {strategy}."
        )
    close = difflib.get_close_matches(strategy.lower(), NAMES, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise ConfigurationError(
        f"trainer.strategy: no strategy is called {strategy!r}{hint} There are {', '.join(NAMES)}, and Lightning's own."
    )


def with_key(error: Exception) -> ConfigurationError:
    """What the Trainer's constructor raised, with the setting that it speaks of in front."""
    if isinstance(error, ConfigurationError):
        return error
    message = str(error)
    if message.startswith("No supported gpu backend"):
        return ConfigurationError("trainer.accelerator: there is no GPU that torch can use, got gpu. Set auto or cpu.")
    known = settings_of(Trainer)
    quoted = [name for name in re.findall(r"`(?:Trainer\()?(\w+)", message) if name in known]
    return ConfigurationError(f"trainer.{quoted[0]}: {message}" if quoted else f"trainer: {message}")

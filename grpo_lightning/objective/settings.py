"""Checks of settings, whose messages name the YAML key."""

from grpo_lightning.types import ConfigurationError


def require(holds: bool, key: str, expected: str, got: object) -> None:
    """Refuse a setting.

    Args:
        holds: Whether it is as expected.
        key: Below ``model.objective``.
        expected: As in "must be {expected}".
        got: Its value.

    Raises:
        ConfigurationError: It is not.
    """
    if not holds:
        raise ConfigurationError(f"model.objective.{key} must be {expected}, got {got}.")


def check_deviation(axis: str, ddof: int, epsilon: float) -> None:
    """The settings of a standard deviation.

    Raises:
        ConfigurationError: `ddof` is neither 0 nor 1, or `epsilon` is negative.
    """
    require(ddof in (0, 1), f"{axis}.ddof", "0 or 1", ddof)
    require(epsilon >= 0, f"{axis}.epsilon", ">= 0", epsilon)


def name(part: object) -> str:
    """The class of a part, as YAML names it."""
    return "null" if part is None else type(part).__name__


def described(key: str, part: object) -> dict[str, str]:
    """A part and its parts, each by its YAML key, so that two can be compared.

    Example:
        >>> described("scale", GroupStd(ddof=1, epsilon=0.0))
        {'scale': 'GroupStd', 'scale.ddof': '1', 'scale.epsilon': '0.0'}
    """
    if isinstance(part, (list, tuple)):
        inner = {f"{key}[{i}]": value for i, value in enumerate(part)}
        found = {key: f"{len(inner)} of them"}
    elif hasattr(part, "__dict__"):
        inner = {f"{key}.{name}": value for name, value in vars(part).items()}
        found = {key: type(part).__name__}
    else:
        return {key: repr(part)}
    for name, value in inner.items():
        found |= described(name, value)
    return found

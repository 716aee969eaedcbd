"""Which checkpoint a run goes on from: one that is whole."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import distributed

from grpo_lightning.checkpointing.manifest import manifest_of, problem_of
from grpo_lightning.checkpointing.search import newest_first
from grpo_lightning.checkpointing.writing import UNFINISHED, put_torn_aside
from grpo_lightning.types import ConfigurationError

T = TypeVar("T")


def whole_checkpoint(named: Path, found: Sequence[Path] = ()) -> Path:
    """The checkpoint to load, verified; the ranks share the reading. A collective.

    Args:
        named: By the user, or the first of `found`.
        found: Those that the run has found itself, the first choice first: a torn one is skipped, saying so.

    Raises:
        ConfigurationError: The one that was named is torn, or all that were found.
    """
    found = _of_all_ranks([*found])[0]
    if named not in found:
        problem = _problem(named)
        if problem is not None:
            raise ConfigurationError(f"ckpt_path: {problem}{_advice(named)}")
        return _said(named)
    for path in found:
        problem = _problem(path)
        if problem is None:
            return _said(path)
        rank_zero_warn(f"The checkpoint {path.name} is skipped, and the next older one looked for: {problem}")
    raise ConfigurationError(f"ckpt_path: none of the {len(found)} checkpoints in {named.parent} is whole.")


def make_room(skipped: Sequence[Path]) -> None:
    """Put torn checkpoints aside, so that the run that goes on without them can write others under their names."""
    for path in skipped:
        if path.exists() and path.parent.name != UNFINISHED:  # of a save that was cut off: the next one clears it away
            torn = put_torn_aside(path)
            rank_zero_info(f"The torn checkpoint {path.name} is now {torn}; the next one of its name takes its place.")


def _said(path: Path) -> Path:
    if not manifest_of(path).exists():
        rank_zero_info(
            f"The checkpoint {path} has no manifest: it cannot be verified. It was written by an earlier version, or "
            "moved without it."
        )
    return path


def _advice(torn: Path) -> str:
    """Which one to take instead."""
    others = newest_first(path for path in torn.parent.glob("*.ckpt") if path.resolve() != torn.resolve())
    whole = next((path for path in others if problem_of(path, with_checksums=False) is None), None)
    return "" if whole is None else f"\nThe newest of the others beside it is {whole.name}."


def _problem(path: Path) -> str | None:
    if not _has_ranks():
        return problem_of(path)
    mine = problem_of(path, rank=distributed.get_rank(), num_ranks=distributed.get_world_size())
    return next(filter(None, _of_all_ranks(mine)), None)


def _of_all_ranks(value: T) -> list[T]:
    if not _has_ranks():
        return [value]
    values: list[T] = [value] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def _has_ranks() -> bool:
    return distributed.is_available() and distributed.is_initialized()

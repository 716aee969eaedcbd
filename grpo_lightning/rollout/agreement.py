"""What the ranks of a run come to together, where one alone may be at fault or know."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import distributed

T = TypeVar("T")


def is_first_rank() -> bool:
    """Whether this is the rank that speaks for all."""
    return num_ranks() == 1 or distributed.get_rank() == 0


def of_first_rank(value: T) -> T:
    """What the first rank has, on every rank. A collective."""
    values: list[Any] = [value]
    if num_ranks() > 1:
        distributed.broadcast_object_list(values)
    found: T = values[0]
    return found


@contextmanager
def together() -> Iterator[None]:
    """Inside, each rank works alone; what one of them raises, all of them raise. Leaving is a collective.

    Of several faults, one that may pass (a `ConnectionError`) gives way to one that does not.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    faults = [fault for fault in _of_all_ranks(own) if fault is not None]
    if not faults:
        return
    fault = min(faults, key=lambda fault: isinstance(fault, ConnectionError))
    if fault is own:
        raise fault
    raise fault from own


def _of_all_ranks(fault: Exception | None) -> list[Exception | None]:
    if num_ranks() == 1:
        return [fault]
    faults: list[Exception | None] = [None] * num_ranks()
    distributed.all_gather_object(faults, _portable(fault))
    return faults


def _portable(fault: Exception | None) -> Exception | None:
    try:
        pickle.loads(pickle.dumps(fault))
    except Exception:
        return RuntimeError(f"{type(fault).__name__}: {fault}")
    return fault


def num_ranks() -> int:
    """How many ranks the run has."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1

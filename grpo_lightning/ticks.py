"""What the training loader yields: not data, but where in an iteration the loop stands."""

from collections.abc import Iterator
from typing import Any, NamedTuple


class Tick(NamedTuple):
    """One micro-batch of one update of one iteration.

    Example: two updates of two micro-batches: ``(0, 0) (0, 1) (1, 0) (1, 1)``, and again.
    """

    update: int
    """Number of the update within the iteration."""
    microbatch: int
    """Number of the micro-batch within the update."""
    num_updates: int
    num_microbatches: int

    @property
    def starts_iteration(self) -> bool:
        """Whether new completions are due."""
        return self.update == 0 and self.microbatch == 0

    @property
    def starts_update(self) -> bool:
        """Whether its gradient is the first of an update."""
        return self.microbatch == 0

    @property
    def ends_update(self) -> bool:
        """Whether the optimizer steps after this micro-batch."""
        return self.microbatch == self.num_microbatches - 1

    @property
    def ends_iteration(self) -> bool:
        """Whether this is the last micro-batch that uses the iteration's completions."""
        return self.ends_update and self.update == self.num_updates - 1


class TickLoader:
    """The ticks of one epoch. Sized and stateful, so that Lightning resumes it in the middle without skipping any.

    Args:
        num_iterations: Of the epoch.
        num_updates: Updates per iteration.
        num_microbatches: Micro-batches per update, the Trainer's `accumulate_grad_batches`.
        limit: The Trainer's `limit_train_batches`: it takes no more of an epoch.
    """

    def __init__(self, *, num_iterations: int, num_updates: int, num_microbatches: int, limit: float = 1.0) -> None:
        self.num_iterations, self.num_updates, self.num_microbatches = num_iterations, num_updates, num_microbatches
        self.num_taken = min(len(self), share_of(limit, len(self)))
        self._next = 0

    @property
    def ticks_per_iteration(self) -> int:
        """Ticks of one iteration."""
        return self.num_updates * self.num_microbatches

    def __len__(self) -> int:
        return self.num_iterations * self.ticks_per_iteration

    def __iter__(self) -> Iterator[Tick]:
        first = self._next if self._next < self.num_taken else 0
        for number in range(first, self.num_taken):
            self._next = number + 1
            update, microbatch = divmod(number % self.ticks_per_iteration, self.num_microbatches)
            yield Tick(update, microbatch, self.num_updates, self.num_microbatches)
        self._next = 0

    def state_dict(self) -> dict[str, Any]:
        """How many ticks of the epoch have been yielded."""
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the ticks that have been yielded."""
        self._next = state["next"]


def share_of(limit: float, number: int) -> int:
    """What Lightning makes of a setting that is a number of batches, or a share of them."""
    return int(limit) if isinstance(limit, int) else int(limit * number)

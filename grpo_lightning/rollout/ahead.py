"""A rollout that is drawn in the background, while the iteration before it is learned from."""

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from threading import Thread
from typing import Any

from grpo_lightning.rollout.engine import Draw, RolloutLostError
from grpo_lightning.types import Completion, FinishReason, Prompt, Rollout


class RolloutAhead:
    """The completions of an iteration to come on one rank, or a promise of them.

    Args:
        iteration: Which one.
        prompts: Of the iteration, over all ranks, by slot.
        slots: Which of them are this rank's.
        completions: Of these, prompt-major, when they are there.
    """

    def __init__(
        self,
        *,
        iteration: int,
        prompts: Sequence[Prompt],
        slots: Sequence[int],
        completions: "Future[list[Completion]]",
    ) -> None:
        self.iteration, self.prompts, self._slots = iteration, prompts, slots
        self._completions = completions
        self._seconds_drawing = self._seconds_waited = 0.0

    @classmethod
    def drawn_by(cls, draw: Draw, *, iteration: int, prompts: Sequence[Prompt], slots: Sequence[int]) -> "RolloutAhead":
        """Draw in a thread that does not outlive the process; what is raised there is raised by `rollout`."""
        completions: Future[list[Completion]] = Future()
        ahead = cls(iteration=iteration, prompts=prompts, slots=slots, completions=completions)

        def run() -> None:
            start = time.perf_counter()
            try:
                drawn = draw()
            except BaseException as error:
                completions.set_exception(error)
            else:
                ahead._seconds_drawing = time.perf_counter() - start
                completions.set_result(drawn)

        Thread(target=run, name=f"rollout of iteration {iteration}", daemon=True).start()
        return ahead

    @property
    def hidden_seconds(self) -> float:
        """For how long it was drawn while nobody waited for it."""
        return max(0.0, self._seconds_drawing - self._seconds_waited)

    def wait(self, seconds: float | None = None) -> None:
        """Until nothing is being drawn any more and the engine is free, or for so long."""
        start = time.perf_counter()
        wait([self._completions], seconds)
        self._seconds_waited += time.perf_counter() - start

    def rollout(self) -> Rollout:
        """The completions. Waits for them.

        Raises:
            BaseException: What was raised in the background; `RolloutLostError` where they can be drawn again.
        """
        self.wait()
        return Rollout(
            iteration=self.iteration,
            slots=tuple(self._slots),
            prompts=tuple(self.prompts[slot] for slot in self._slots),
            completions=tuple(self._completions.result()),
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain containers, without completions where there will be none; those of ranks are merged by `merged`."""
        self.wait()
        completions = None
        if self._completions.exception() is None:
            described = [_described(completion) for completion in self._completions.result()]
            size = len(described) // len(self._slots) if self._slots else 0
            completions = {slot: described[p * size : (p + 1) * size] for p, slot in enumerate(self._slots)}
        indices = [prompt.index for prompt in self.prompts]
        return {"iteration": self.iteration, "prompts": indices, "completions": completions}

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], prompts: Iterable[Prompt], *, rank: int, world_size: int
    ) -> "RolloutAhead":
        """A rank's share of a merged state.

        Args:
            state: Without completions, the rollout is lost.
            prompts: All that there are.
            rank: Of this process.
            world_size: Of this run; the one that wrote the state may have had another.
        """
        by_index = {prompt.index: prompt for prompt in prompts}
        slots = range(rank, len(state["prompts"]), world_size)
        completions: Future[list[Completion]] = Future()
        if state["completions"] is None:
            completions.set_exception(RolloutLostError("the checkpoint has none for these settings"))
        else:
            completions.set_result([_completion(row) for slot in slots for row in state["completions"][slot]])
        of_iteration = [by_index[index] for index in state["prompts"]]
        return cls(iteration=state["iteration"], prompts=of_iteration, slots=slots, completions=completions)


def merged(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One state with the completions of every rank; without any where a rank has none."""
    shares = [state["completions"] for state in states]
    whole = None if None in shares else {slot: rows for share in shares for slot, rows in share.items()}
    return {**states[0], "completions": whole}


def _described(completion: Completion) -> dict[str, Any]:
    return {**vars(completion), "finish_reason": completion.finish_reason.value}


def _completion(described: Mapping[str, Any]) -> Completion:
    return Completion(**{**described, "finish_reason": FinishReason(described["finish_reason"])})

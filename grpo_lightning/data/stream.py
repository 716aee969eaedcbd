"""The global order of the training prompts."""

from array import array
from collections.abc import Sequence, Set
from functools import cached_property
from hashlib import sha256
from typing import Any

from grpo_lightning.functional.random import permutation
from grpo_lightning.types import ConfigurationError, Prompt, Stream


class PromptStream:
    """Training prompts without end: epoch e is a permutation that (seed, e) determine, the same on every rank.

    Args:
        prompts: The training prompts, at least one.
        seed: Of the order.

    Raises:
        ConfigurationError: There are no prompts.

    Example:
        >>> prompts = [Prompt(index=i, token_ids=(i,), text=str(i)) for i in range(3)]
        >>> stream = PromptStream(prompts, seed=0)
        >>> first_epoch = stream.take(3)
        >>> sorted(prompt.index for prompt in first_epoch)
        [0, 1, 2]
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int) -> None:
        if not prompts:
            raise ConfigurationError("data: the train split has no prompts.")
        self.prompts = prompts
        self.seed = seed
        self.epoch = 0
        self.cursor = 0
        self.retired: set[int] = set()
        self._indices = {prompt.index for prompt in prompts}
        self._order = self._permutation()

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts, on into the next epoch where this one ends.

        Raises:
            ConfigurationError: Every prompt has been retired.
        """
        taken: list[Prompt] = []
        while len(taken) < n:
            if len(self.retired) == len(self._indices):
                raise ConfigurationError(f"data: all {len(self.prompts)} prompts of the train split have been retired.")
            if self.cursor == len(self.prompts):
                self.epoch, self.cursor = self.epoch + 1, 0
                self._order = self._permutation()
            prompt = self.prompts[self._order[self.cursor]]
            self.cursor += 1
            if prompt.index not in self.retired:
                taken.append(prompt)
        return taken

    def take_distinct(self, n: int) -> list[Prompt]:
        """The next n prompts, none of them twice, unless there are fewer than n.

        Where an epoch ends among them, the next one may begin with some of the same: they have had their turn.
        """
        if self.num_others(frozenset()) < n:
            return self.take(n)
        return self.take_others(n, than=frozenset())

    def num_others(self, than: Set[int]) -> int:
        """How many prompts are neither retired nor have an index among `than`."""
        return len(self._indices - self.retired - than)

    def take_others(self, n: int, *, than: Set[int]) -> list[Prompt]:
        """The next n prompts that differ from each other and from those with an index among `than`.

        What is passed over has had its turn. There must be n such prompts, see `num_others`.
        """
        assert self.num_others(than) >= n, "the caller has asked how many there are"
        taken: dict[int, Prompt] = {}
        while len(taken) < n:
            (prompt,) = self.take(1)
            if prompt.index not in than:
                taken.setdefault(prompt.index, prompt)
        return list(taken.values())

    def retire(self, index: int) -> None:
        """Never draw the prompt of this `Prompt.index` again.

        An index is not a place in the list: where long prompts were dropped, the two differ.

        Raises:
            ValueError: No prompt has this index.
        """
        if index not in self._indices:
            raise ValueError(f"no training prompt has the index {index}")
        self.retired.add(index)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, and a fingerprint of what it stands in."""
        return {
            "epoch": self.epoch,
            "cursor": self.cursor,
            "retired": sorted(self.retired),
            "num_prompts": len(self.prompts),
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another stream over the same data stood.

        Raises:
            ConfigurationError: The training prompts, or the seed of their order, are not those of the checkpoint.
        """
        if state["fingerprint"] != self._fingerprint:
            raise ConfigurationError(
                f"data: the train split ({len(self.prompts)} prompts, seed {self.seed}) is not the one that the "
                f"checkpoint was trained on ({state['num_prompts']} prompts).\n"
                "Resume with its data and seed, or start a new run from the exported policy."
            )
        self.epoch, self.cursor, self.retired = state["epoch"], state["cursor"], set(state["retired"])
        self._order = self._permutation()

    def _permutation(self) -> list[int]:
        order = permutation(len(self.prompts), seed=self.seed, stream=Stream.PROMPT_ORDER, epoch=self.epoch)
        return [int(i) for i in order.tolist()]

    @cached_property
    def _fingerprint(self) -> str:
        """A hash of the seed, and of every prompt's index, length and tokens."""
        digest = sha256(f"{self.seed} {len(self.prompts)}".encode())
        for prompt in self.prompts:
            digest.update(array("q", (prompt.index, len(prompt.token_ids), *prompt.token_ids)).tobytes())
        return digest.hexdigest()[:16]

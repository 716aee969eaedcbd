"""The contract that every rollout engine keeps."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Self

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_lightning.types import Completion, Coordinates, GenerationRequest, SamplingParams

Gathering = Literal["whole", "layerwise"]
"""What `generate` finds of weights that ranks have in shards: all of them whole, or a layer while it is computed."""

Draw = Callable[[], list[Completion]]
"""Draws what was asked for when it was made."""


class RolloutLostError(ConnectionError):
    """What drew the completions is gone, and they with it. They can be drawn again."""


class RolloutEngine(ABC):
    """Draws completions from the policy.

    Every engine keeps this contract, to which one test holds them all:

    * `generate` returns `num_completions` completions for each request, request-major, in the order of the requests.
    * `sampler_logprobs` are those of the distribution really drawn from, and equal a teacher-forced forward's.
    * A token is a function of (seed, stream, iteration, slot, sample index, position) and the weights alone: whatever
      else is in the batch, and however the requests are spread over ranks, the same coordinates give the same tokens:
      exactly in fp64, and in fp32 up to draws that fall within rounding of a boundary between two tokens.
    * An end-of-sequence token exactly at the length limit is `FinishReason.EOS`, not a truncation.
    """

    gather: Gathering = "whole"
    """See `Gathering`. What is whole is so for as long as the module has the engine draw."""
    has_copy = False
    """Whether it draws from weights of its own, for which those of the policy need not be put together."""
    called_together: Callable[[], AbstractContextManager[object]] = nullcontext
    """Inside, all ranks together can call the policy, each as often as the others: for engines that compare with it."""

    @property
    def draws_alone(self) -> bool:
        """Whether `generate` exchanges nothing between ranks, so that it can be broken off on one of them."""
        return False

    @abstractmethod
    def setup(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, eos_token_ids: frozenset[int]) -> None:
        """Attach the policy whose completions are wanted. Called once, before the first `generate`."""

    @abstractmethod
    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams, coordinates: Coordinates
    ) -> list[Completion]:
        """Draw the completions of every request."""

    @abstractmethod
    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Note that the policy's weights have changed; the next `generate` draws from them.

        Args:
            named_tensors: The weights, each in full, as they are when they are iterated over. An engine with a copy of
                its own does so within `generate`, as often as it must; others never do.
            version: The number of optimizer steps behind them.
        """

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: callbacks that copy the whole module, to average its weights, draw nothing from the copy."""
        return self

    def close(self) -> None:  # noqa: B027 - most engines hold nothing to give back
        """Give back what the engine holds. Called once, after the last `generate`."""


class DrawsAhead(ABC):
    """What an engine has beside `generate` if it can draw while the policy is being updated."""

    @abstractmethod
    def begin(self, requests: Sequence[GenerationRequest], sampling: SamplingParams, coordinates: Coordinates) -> Draw:
        """Take the policy's weights over as they are now, and check what can be checked of them.

        Returns:
            What draws the completions of every request from those weights, whatever becomes of the policy's. It is
            called once, in another thread, and asks nothing of the policy. Until it has returned, no method of the
            engine is called but `update_weights`, which it does not heed, and `close`, which ends it. It raises
            `RolloutLostError` where the weights are not there any more.
        """

"""Rewards that are plain functions."""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from grpo_lightning.rewards.callback import RewardCallback
from grpo_lightning.types import Completion, Prompt, Score


class FunctionReward(RewardCallback):
    """Wraps any importable function with the signature that the ecosystem writes.

    ``f(prompts, completions, **columns) -> list[float | None]``, sync or async. Prompts and completions are texts; for
    conversations they are lists of messages. Keyword arguments are the data's columns, a list with one value per
    completion, and ``completion_ids``, the tokens; a function without ``**`` gets those that it names.

    Args:
        function: By dotted path, also from a file of the current folder.
        name: Of the reward; None takes the function's.
        weight: Factor of this reward in a completion's total.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None, weight: float = 1.0) -> None:
        super().__init__(name=name or getattr(function, "__name__", type(function).__name__), weight=weight)
        self.function = function

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[Score]:
        """Call the function once, on all completions."""
        arguments = self._accepted(_columns(prompts, completions))
        result = self.function(
            prompts=[list(p.messages) if p.messages else p.text for p in prompts],
            completions=[
                [{"role": "assistant", "content": c.text}] if p.messages else c.text
                for p, c in zip(prompts, completions, strict=True)
            ],
            **arguments,
        )
        scores: Sequence[Score] = asyncio.run(result) if inspect.iscoroutine(result) else result
        return scores

    def _accepted(self, arguments: dict[str, Any]) -> dict[str, Any]:
        parameters = inspect.signature(self.function).parameters
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            return arguments
        return {name: value for name, value in arguments.items() if name in parameters}


def _columns(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> dict[str, Any]:
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    columns: dict[str, Any] = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    return {**columns, "completion_ids": [list(completion.token_ids) for completion in completions]}

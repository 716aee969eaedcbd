"""A reward from a plain function, with the signature that the ecosystem already writes."""

import asyncio
import importlib
import inspect
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer

from grpo_lightning.rewards.callback import RewardCallback
from grpo_lightning.rewards.isolated_scoring import IsolatedScoring
from grpo_lightning.rewards.isolation import locate
from grpo_lightning.types import Completion, ConfigurationError, Prompt, Score

_NOT_COLUMNS = frozenset({"prompt", "prompts", "completion", "completions", "completion_ids"})

# Stands for the functions `log_extra` and `log_metric`: takes any arguments, does nothing, can be sent to a worker.
_DISCARD = "".format


class FunctionReward(RewardCallback):
    """Scores completions with a function, for instance one written for TRL's `GRPOTrainer`, unchanged.

    The function is called with keyword arguments and returns one score per completion. It may be `async`::

        def brevity(completions, **kwargs):
            return [-len(completion) / 100 for completion in completions]

    ===================  =============================================================================
    Argument             Content, one entry per completion where it is a list
    ===================  =============================================================================
    ``prompts``          texts; for conversational data lists of messages
    ``completions``      texts; for conversational data ``[{"role": "assistant", "content": text}]``
    ``completion_ids``   the completions' tokens
    *a column's name*    the values of that column of the data set; None where a row lacks it
    ``trainer_state``    an object with `global_step`, `max_steps`, `epoch`; None without a Trainer
    ``log_extra``,       functions that take what they are given and do nothing with it
    ``log_metric``
    ===================  =============================================================================

    A function without ``**kwargs`` gets those it names. (Source: TRL 1.16, "GRPO Trainer", on custom reward
    functions.)

    Args:
        function: The function, in YAML as a dotted path. Modules of the current folder are importable.
        name: The reward's name; None for the function's.
        weight: Factor of this reward in a completion's total.
        pointwise: Whether a completion's score depends on that completion and its prompt alone. Then one completion
            on which the function fails does not take the others with it. Set it to false for a function that
            compares completions.
        isolate: Call the function in processes of its own, for each completion by itself where it is `pointwise`. A
            crash then costs that completion, not the run. The function must stand at the top level of a file.
        timeout_seconds: Longest time for one call; needs `isolate`, since nothing else can stop a running function.
        on_timeout: What a completion is worth whose call took longer. ``exclude``: it is a failure, and takes no part
            in the update. A number: that score. Choose a number where the completion itself causes the timeout, as an
            endless loop in its code does: excluding it teaches that endless loops are free.
        num_workers: How many processes `isolate` uses.

    Raises:
        ConfigurationError: The function cannot be imported, or a setting contradicts another.

    Example:
        >>> def is_short(completions, **kwargs):
        ...     return [float(len(completion) < 10) for completion in completions]
        >>> FunctionReward(is_short).name
        'is_short'
    """

    def __init__(
        self,
        function: Callable[..., Any] | str,
        name: str | None = None,
        weight: float = 1.0,
        pointwise: bool = True,
        isolate: bool = False,
        timeout_seconds: float | None = None,
        on_timeout: Literal["exclude"] | float = "exclude",
        num_workers: int = 2,
    ) -> None:
        self.function = _import_function(function) if isinstance(function, str) else function
        name = name or getattr(self.function, "__name__", None)
        if name is None:
            raise ConfigurationError(f"FunctionReward.name must be given: {function!r} has no name of its own.")
        super().__init__(name, weight)
        if not isolate and (timeout_seconds is not None or on_timeout != "exclude"):
            raise ConfigurationError(
                "FunctionReward.timeout_seconds and FunctionReward.on_timeout need FunctionReward.isolate: true,\n"
                "because a running function can only be stopped in a process of its own."
            )
        self.pointwise = pointwise
        self._isolated = (
            IsolatedScoring(
                locate(self.function), timeout_seconds=timeout_seconds, on_timeout=on_timeout, num_workers=num_workers
            )
            if isolate
            else None
        )
        self._trainer: Trainer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Remember the Trainer, whose progress the function may ask for."""
        self._trainer = trainer

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[Score]:
        """What the function returns, for all completions at once or, isolated, for each by itself."""
        if self._isolated is None:
            scores = self.function(**self._arguments(prompts, completions))
            return _wait_for(scores) if inspect.iscoroutine(scores) else scores
        if not self.pointwise:
            return self._isolated.score_batch(self, self._arguments(prompts, completions), len(completions))
        calls = [
            self._arguments([prompt], [completion]) for prompt, completion in zip(prompts, completions, strict=True)
        ]
        return self._isolated.score_each(self, calls)

    def close(self) -> None:
        """End the function's processes, if it has any."""
        self._trainer = None
        if self._isolated is not None:
            self._isolated.close()

    def _arguments(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> dict[str, Any]:
        """The keyword arguments for these completions, as far as the function takes them."""
        columns = dict.fromkeys(column for prompt in prompts for column in prompt.columns if column not in _NOT_COLUMNS)
        available = {
            **{column: [prompt.columns.get(column) for prompt in prompts] for column in columns},
            "prompts": [_prompt(prompt) for prompt in prompts],
            "completions": [_completion(*pair) for pair in zip(prompts, completions, strict=True)],
            "completion_ids": [list(completion.token_ids) for completion in completions],
            "trainer_state": self._trainer_state(),
            "log_extra": _DISCARD,
            "log_metric": _DISCARD,
        }
        return self._accepted(available)

    def _accepted(self, available: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `available` that the function's signature has a place for."""
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):  # some functions written in C have none
            return available
        for parameter in parameters:
            by_keyword = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            required = parameter.default is parameter.empty and by_keyword
            if parameter.kind is parameter.POSITIONAL_ONLY or (required and parameter.name not in available):
                raise ConfigurationError(
                    f"{self}: the function needs {parameter.name!r}, which cannot be given by keyword.\n"
                    f"It can have: {', '.join(available)}. Columns are mapped under `data`."
                )
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return available
        names = {parameter.name for parameter in parameters}
        return {name: value for name, value in available.items() if name in names}

    def _trainer_state(self) -> SimpleNamespace | None:
        if self._trainer is None:
            return None
        trainer = self._trainer
        return SimpleNamespace(
            global_step=trainer.global_step, max_steps=trainer.max_steps, epoch=float(trainer.current_epoch)
        )


def _prompt(prompt: Prompt) -> str | list[dict[str, str]]:
    return prompt.text if prompt.messages is None else [dict(message) for message in prompt.messages]


def _completion(prompt: Prompt, completion: Completion) -> str | list[dict[str, str]]:
    if prompt.messages is None:
        return completion.text
    return [{"role": "assistant", "content": completion.text}]


def _import_function(path: str) -> Callable[..., Any]:
    """The function that a dotted path names."""
    module, _, name = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"FunctionReward.function must be the dotted path of a function, for instance my_rewards.brevity, "
            f"got {path!r}:\n{error}"
        ) from error
    if not callable(function):
        raise ConfigurationError(f"FunctionReward.function must be a function, but {path!r} is {function!r}.")
    return function  # type: ignore[no-any-return]  # callable() has just said so


def _wait_for(scores: Coroutine[Any, Any, Sequence[Score]]) -> Sequence[Score]:
    """Run a coroutine to its end, in a thread of its own because a notebook's thread already runs an event loop."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(asyncio.run, scores).result()
